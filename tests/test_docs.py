"""Links, files, definitions, recipe keys, options and public names that the pages name have to exist."""

import ast
import importlib
import inspect
import re
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

import blip2
from blip2 import config
from blip2.cli import main

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "blip2"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]
"""The pages that name what exists now."""
SECTIONS = sorted(name for name, value in config.Recipe.__annotations__.items() if "Config" in value)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- families: begin -->.*<!-- families: end -->", flags=re.DOTALL)


def prose(page):
    """A page without its fenced code and its generated tables."""
    return FENCE.sub("", GENERATED.sub("", PAGES[page]))


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def fenced(page, language):
    return [code for name, code in FENCE.findall(PAGES[page]) if name == language]


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@cache
def definitions(path):
    """The names that a file defines: functions, classes, constants, and members of classes as ``Class.member``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for child in ast.walk(node):
                if isinstance(child, ast.FunctionDef):
                    found |= {f"{node.name}.{child.name}", child.name}
                elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                    found.add(f"{node.name}.{child.target.id}")
                elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                    found.add(f"{node.name}.{child.attr}")
    return found


def find(name):
    """The files that a name of a page stands for: from the root, from src or from src/blip2; ``*`` is a wildcard."""
    return [path for folder in (ROOT, SOURCE, SOURCE.parent) for path in folder.glob(name.rstrip("/"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        file, _, anchor = link.partition("#")
        if "://" not in file:
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), link
            if anchor:
                assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", CURRENT)
def test_files_and_definitions_exist(page):
    for span in spans(page):
        if re.fullmatch(r"(src|tests|recipes|benchmarks|docs)/[\w./*-]*|[\w/]+\.py", span):
            assert find(span) or find(f"*/{span}"), span
        if match := re.match(r"([A-Z]\w+[a-z]\w*\.[a-z_]\w+)$", span):
            assert any(match[1] in definitions(path) for path in SOURCE.rglob("*.py")), span
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w[\w.]*`(?:, )?)+)", prose(page)):
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in definitions(find(file)[0]) or find(name), f"{file}: {name}"
    for name in re.findall(r"recipes/([\w-][\w.-]*\.yaml)", PAGES[page]):
        assert (ROOT / "recipes" / name).is_file(), name


@pytest.fixture(scope="module")
def options():
    """The options of a command, by running it with ``--help``."""

    @cache
    def of(command):
        with pytest.MonkeyPatch.context() as patch:
            printed = []
            patch.setattr("sys.stdout.write", lambda text: printed.append(text) or len(text))
            try:
                main([command, "--help"])
            except SystemExit as stopped:
                assert stopped.code == 0
        return set(re.findall(r"--([a-z][\w.-]*)", "".join(printed)))

    return of


@pytest.mark.parametrize("page", CURRENT)
def test_keys_and_options_exist(page, options):
    keys = options("train")
    named = re.compile(rf"(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_.]+[a-z])\b(?:[: ].*)?")
    for span in spans(page):
        if match := named.fullmatch(span):
            assert match[1] in keys, span
    for code in fenced(page, "yaml"):
        for key, value in yaml.safe_load(code).items():
            assert key in keys, key
            if key in SECTIONS:
                assert {f"{key}.{name}" for name in value} <= keys
    commands = re.sub(r"\\\n\s+", " ", PAGES[page])
    for command, arguments in re.findall(r"\bblip2 ([a-z]+)\b([^`\n]*)", commands):
        if re.search(rf"(^|`|\n    .*)blip2 {command}{re.escape(arguments)}", commands) and "--" in arguments:
            for option in re.findall(r"(?<!\S)--([a-z][\w.-]*)", arguments.split("#")[0]):
                assert option in keys | options(command), f"{command} --{option}"


@pytest.mark.parametrize("page", CURRENT)
def test_python_names_exist(page):
    """Names that code imports from blip2, and the keywords of their calls."""
    for code in [*fenced(page, "python"), *(span for span in spans(page) if re.match(r"blip2\.\w+\(", span))]:
        tree = ast.parse(code)
        public = {f"blip2.{name}": getattr(blip2, name) for name in blip2.__all__}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "blip2":
                module = importlib.import_module(node.module)
                public |= {alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (called := public.get(ast.unparse(node.func))):
                keywords = {keyword.arg for keyword in node.keywords}
                assert keywords <= set(inspect.signature(called).parameters), ast.unparse(node)


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"^::: ([\w.]+)", PAGES["docs/reference.md"], flags=re.MULTILINE))
    classes = [value for value in vars(config).values() if is_dataclass(value)]
    public = {f"blip2.{name}" for name in blip2.__all__} | {f"{kind.__module__}.{kind.__name__}" for kind in classes}
    assert public <= named


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [
        page
        for entry in navigation
        for value in entry.values()
        for page in (value if isinstance(value, list) else [value])
    ]
    files = {next(iter(page.values())) if isinstance(page, dict) else page for page in pages}
    assert files == {path.name for path in (ROOT / "docs").glob("*.md")}
