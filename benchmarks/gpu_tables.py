"""The tables of docs/performance.md and docs/scale.md, from the JSON that `gpu.py` writes."""

from __future__ import annotations

from typing import Any

GIB = 2**30
PROFILES = "profile of "


def tables(parts: dict[str, Any]) -> str:
    """What was checked, how fast it was, and where the time goes, in Markdown."""
    if not parts:
        return "nothing has been measured yet"
    machine = next(iter(parts.values()))["machine"]
    rate = rate_of(parts)
    head = f"{machine['gpu'] or 'a CPU'}, PyTorch {machine['torch']}, transformers {machine['transformers']}"
    if rate:
        head += f"; products of matrices in bf16 run at {rate / 1e12:,.0f} TFLOP/s"
    return "\n\n".join([head, checked(parts), speed(parts, rate), *profiles(parts)])


def rate_of(parts: dict[str, Any]) -> float | None:
    """Operations a second of a large product."""
    rows = parts.get("rates", {}).get("rows", [])
    return next((row["operations_a_second"] for row in rows if row["name"] == "product"), None)


def checked(parts: dict[str, Any]) -> str:
    lines = ["| checked | found | at most |", "|---|---:|---:|"]
    for part in parts.values():
        for row in part["rows"]:
            if "limit" in row:
                limit = "" if row["limit"] is None else f"{row['limit']:g}"
                found = row["value"] if isinstance(row["value"], str) else f"{row['value']:.2g}"
                lines.append(f"| {row['name']} | {found if row['ok'] else f'**{found}**'} | {limit} |")
        if part["error"]:
            lines.append(f"| {part['error'].strip().splitlines()[-1]} | **failed** | |")
    return "\n".join(lines)


def speed(parts: dict[str, Any], rate: float | None) -> str:
    """One row a measurement: the ratio to the peer where there is one, and our share of the card's rate."""
    lines = [
        "| work | batch | peer | blip2 / peer, ms | ratio (lowest to highest) | share of the rate | peak, GiB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    counted = [row for row in rows_of(parts) if row["name"] == "operations of a stage-1 step"]
    per_pair = counted[0]["operations"] / counted[0]["batch"] if counted else None
    for row in rows_of(parts):
        name = row["name"]
        if name.startswith((PROFILES, "operations of")) or not ("ours" in row or "seconds" in row):
            continue
        seconds = row.get("ours", row.get("seconds"))
        batch = row.get("batch", row.get("images", ""))
        done = row.get("operations")
        if done is None and name.startswith("stage-1 step") and per_pair and not name.endswith("LAVIS"):
            done = per_pair * batch
        share = f"{100 * done / seconds / rate:.0f} %" if done and rate else ""
        if "theirs" in row:
            times = f"{1e3 * seconds:,.4g} / {1e3 * row['theirs']:,.4g}"
            ratio = f"**{row['ratio']:.2f}** ({row['lowest']:.2f} to {row['highest']:.2f})"
            memory = f"{row['our_peak'] / GIB:.1f} / {row['their_peak'] / GIB:.1f}"
        else:
            times, ratio, memory = f"{1e3 * seconds:,.4g}", "", f"{row['peak'] / GIB:.1f}"
        lines.append(f"| {name} | {batch} | {row.get('peer', '')} | {times} | {ratio} | {share} | {memory} |")
    return "\n".join(lines)


def profiles(parts: dict[str, Any]) -> list[str]:
    found = []
    for row in rows_of(parts):
        if not row["name"].startswith(PROFILES):
            continue
        lines = [
            f"{row['name'].removeprefix(PROFILES)}: {1e3 * row['seconds']:.4g} ms, of which the GPU waits"
            f" {100 * row['waiting']:.0f} %, {row['launches']} kernels",
            "",
            "| kernel | ms | times |",
            "|---|---:|---:|",
        ]
        for kernel in row["kernels"]:
            lines.append(f"| `{kernel['name'][:90]}` | {1e3 * kernel['seconds']:.3g} | {kernel['calls']} |")
        found.append("\n".join(lines))
    return found


def rows_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in parts.values() for row in part["rows"]]
