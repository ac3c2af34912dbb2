import * as server from "./server.js";
import { ImagePlace, drawMap, drawMapOver, meanMap, readImage, showError } from "./images.js";
import { bar, closeWord, paragraph, percent, showWords, toWords } from "./words.js";

const get = (id) => document.getElementById(id);
const VIEWS = { image: "What is in an image", compare: "Compare two images", search: "Search the library" };
const TOP_LOGPROBS = 5;
const THUMBNAIL = 112; // pixels
const POINTING = 200; // milliseconds for which a word is pointed at before the server is asked about it

/** What the server offers; see `server.describe`. */
let offer = null;

// -- small things -----------------------------------------------------------------------------------------------------

function make(tag, content = [], attributes = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...[content].flat());
  return element;
}

/** Run something, and show its error in its place. Return undefined if there was one. */
async function attempt(place, action) {
  showError(place, null);
  try {
    return await action();
  } catch (error) {
    if (error.status === 401) askForKey(error);
    showError(place, error);
    return undefined;
  }
}

const runs = new Map();

/** Return a signal that is aborted when the same task begins again. */
function begin(task) {
  runs.get(task)?.abort();
  const controller = new AbortController();
  runs.set(task, controller);
  return controller.signal;
}

/** Say a text to screen readers, once it is complete. */
function say(text) {
  const place = get("spoken");
  place.textContent = "";
  setTimeout(() => (place.textContent = text), 100);
}

function fillSelect(id, models) {
  const select = get(id);
  select.replaceChildren(...models.map((model) => make("option", model.id, { value: model.id })));
  select.parentElement.hidden = models.length < 2;
  return models.length > 0;
}

const able = (task) => offer.models.filter((model) => model.tasks.includes(task));
const chosen = (id) => get(id).value;

const writers = new WeakMap(); // the stream that a place shows

/** Stream an answer into a place, and return it; its words show their probabilities at the end. */
async function write(place, stream, label, pointAt) {
  writers.set(place, stream);
  closeWord();
  place.textContent = "";
  place.classList.add("waiting");
  let text = "";
  const tokens = [];
  const tokenIds = [];
  try {
    for await (const chunk of stream) {
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      text += choice.delta?.content ?? "";
      tokens.push(...(choice.logprobs?.content ?? []));
      tokenIds.push(...(choice.token_ids ?? []));
      place.textContent = text;
    }
  } finally {
    if (writers.get(place) === stream) {
      place.classList.remove("waiting");
      if (text) showWords(place, text, tokens, label, pointAt?.(tokenIds));
    }
  }
  say(`${label}: ${text}`);
  return text;
}

// -- one image --------------------------------------------------------------------------------------------------------

let messages = [];

const place = new ImagePlace(get("drop"), "Choose an image", "The image", openImage);

function openImage(image) {
  get("view-image").querySelector(".columns").classList.add("filled");
  get("caption").hidden = !able("caption").length;
  get("ask").hidden = !able("chat").length;
  get("match").hidden = !able("rerank").length;
  begin("match"); // so that the results of the last image do not arrive
  get("match-results").replaceChildren();
  showError(get("match-error"), null);
  get("search-image").hidden = !offer.library;
  restart();
  writeCaption();
  readMaps(image);
}

async function writeCaption() {
  if (!able("caption").length) return;
  const signal = begin("caption");
  const model = chosen("caption-model");
  await attempt(get("caption-error"), () =>
    write(
      get("caption-text"),
      server.streamCaption(model, place.image.data, TOP_LOGPROBS, signal),
      "Caption",
      (tokenIds) => pointAtWords(model, [server.question("", place.image.data)], tokenIds),
    ),
  );
}

/**
 * Return what is called when a word of a text is pointed at: it draws what the queries looked at for this word, and
 * returns it for the details, with the probability of the word without the image. The server is asked once, when the first word is pointed at.
 */
function pointAtWords(model, asked, tokenIds) {
  if (!able("explain").some((each) => each.id === model)) return undefined;
  const { image } = place;
  let explained = null;
  let current = null;
  return async (index, word) => {
    current = index;
    place.previewMap(null);
    if (index === null || place.image !== image) return undefined;
    await new Promise((resolve) => setTimeout(resolve, POINTING));
    if (current !== index) return undefined;
    explained ??= server.explain(model, asked, tokenIds);
    let found;
    try {
      found = await explained;
    } catch (error) {
      explained = null; // so that the next word asks again
      return [paragraph(error.message)];
    }
    const words = toWords(found.tokens);
    const own = words[words.findIndex((each) => each.text.trim()) + index]; // the text begins after white space
    if (!own || own.text.trim() !== word.text.trim()) return undefined;
    const map = wordMap(own, found.maps);
    if (current === index && place.image === image) place.previewMap(map, `For “${word.text.trim()}”`);
    const blank = percent(Math.exp(own.tokens.reduce((sum, each) => sum + each.blank_logprob, 0)));
    return [paragraph(`With a blank image: ${blank}`), ...(place.isInSight ? [] : [smallMap(map, image)])];
  };
}

/** Return a canvas with an image and a map over it, for when the image itself is out of sight. */
function smallMap(map, { element }) {
  const canvas = make("canvas", [], { class: "small-map", "aria-hidden": "true" });
  const scale = THUMBNAIL * 4 / Math.max(element.naturalWidth, element.naturalHeight);
  drawMap(canvas, map, element.naturalWidth * scale, element.naturalHeight * scale, element);
  return canvas;
}

/** Return the attention of the queries, weighted by how much each of them speaks for a word. */
function wordMap(word, all) {
  const effects = all.map((_, query) => Math.max(0, word.tokens.reduce((sum, each) => sum + each.effects[query], 0)));
  const total = effects.reduce((sum, each) => sum + each, 0);
  return meanMap(all, total ? effects.map((each) => each / total) : undefined);
}

async function readMaps(image) {
  const models = able("attention");
  get("looked").hidden = !models.length;
  get("query-maps").replaceChildren();
  if (!models.length) return;
  const signal = begin("maps");
  const found = await attempt(get("looked-error"), () => server.attention(models[0].id, image.data, null, signal));
  if (!found || place.image !== image) return;
  const all = [["All", "All queries", found.mean], ...found.queries.map((map, i) => [i + 1, `Query ${i + 1}`, map])];
  const scale = THUMBNAIL / Math.max(image.element.naturalWidth, image.element.naturalHeight);
  for (const [short, name, map] of all) {
    const canvas = make("canvas", [], { "aria-hidden": "true" });
    drawMap(canvas, map, image.element.naturalWidth * scale, image.element.naturalHeight * scale, image.element);
    const button = make("button", [canvas, make("span", String(short), { "aria-hidden": "true" })], {
      type: "button",
      "aria-pressed": "false",
      "aria-label": name,
    });
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") === "true";
      place.hideMap();
      if (pressed) return;
      button.setAttribute("aria-pressed", "true");
      place.showMap(map, name);
    });
    get("query-maps").append(button);
  }
}

place.frame.addEventListener("map-hidden", () => {
  for (const button of get("query-maps").children) button.setAttribute("aria-pressed", "false");
});

function restart() {
  begin("ask");
  closeWord();
  messages = [];
  get("ask-stop").hidden = true;
  get("turns").replaceChildren();
  get("ask-again").hidden = true;
  showError(get("ask-error"), null);
}

async function ask(question) {
  const signal = begin("ask");
  const answer = make("div", [], { class: "text answer" });
  const turn = make("div", [make("p", question, { class: "question" }), answer], { class: "turn" });
  get("turns").append(turn);
  get("ask-stop").hidden = false;
  const model = chosen("ask-model");
  const before = get("remember").checked ? messages : [];
  const asked = [...before, server.question(question, before.length ? null : place.image.data)];
  const stream = server.streamAnswer(model, asked, TOP_LOGPROBS, signal);
  const pointAt = (tokenIds) => pointAtWords(model, asked, tokenIds);
  const text = await attempt(get("ask-error"), () => write(answer, stream, "Answer", pointAt));
  const isLast = runs.get("ask").signal === signal;
  if (isLast) get("ask-stop").hidden = true;
  if (text === undefined && !answer.textContent) turn.remove();
  get("ask-again").hidden = !get("turns").childElementCount;
  if (text === undefined) {
    if (isLast && !get("question").value) get("question").value = question;
    return;
  }
  if (isLast) messages = [...asked, { role: "assistant", content: text }];
}

get("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question) return;
  get("question").value = "";
  ask(question);
});
get("ask-stop").addEventListener("click", () => {
  runs.get("ask").abort();
  get("question").focus();
});
get("ask-again").addEventListener("click", () => {
  restart();
  get("question").focus();
});
get("caption-model").addEventListener("change", writeCaption);
get("ask-model").addEventListener("change", restart);

get("match-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const lines = get("lines").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!lines.length) return;
  const signal = begin("match");
  const rows = await attempt(get("match-error"), () => server.match(chosen("match-model"), place.image.data, lines, signal));
  if (!rows) return;
  const head = make("tr", ["Text", "ITC", "ITM"].map((name) => make("th", name, { scope: "col" })));
  const body = rows.map(({ text, itc, itm }) =>
    make("tr", [
      make("th", text, { scope: "row", class: "line" }),
      make("td", [make("span", itc.toFixed(3), { class: "number" }), bar((itc + 1) / 2)], { class: "score" }),
      make("td", [make("span", percent(itm), { class: "number" }), bar(itm)], { class: "score" }),
    ]),
  );
  const table = make("table", [make("thead", head), make("tbody", body)]);
  const hint = "ITC is the cosine similarity, from -1 to 1. ITM is the probability that image and text match.";
  get("match-results").replaceChildren(table, make("p", hint, { class: "hint legend" }));
});

// -- two images -------------------------------------------------------------------------------------------------------

const first = new ImagePlace(get("drop-first"), "Choose the first image", "The first image", compare);
const second = new ImagePlace(get("drop-second"), "Choose the second image", "The second image", compare);

async function compare() {
  if (!first.image || !second.image) return;
  get("both").hidden = !able("chat").length;
  begin("both");
  get("both-turns").replaceChildren();
  if (!able("rerank").length) return;
  const signal = begin("compare");
  get("similarity").textContent = "";
  const similarity = await attempt(get("similarity-error"), () =>
    server.similarity(able("rerank")[0].id, first.image.data, second.image.data, signal),
  );
  if (similarity === undefined) return;
  get("similarity").replaceChildren(
    make("strong", similarity.toFixed(3), { class: "number" }),
    "similarity",
    make("p", "The mean, over the queries of the first image, of the largest cosine to a query of the second: from -1 to 1, the value for equal images.", { class: "hint" }),
  );
}

get("both-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = get("both-question").value.trim();
  if (!question) return;
  get("both-question").value = "";
  const signal = begin("both");
  const places = ["First image", "Second image"].map((name) => ({ name, text: make("div", [], { class: "text answer" }) }));
  const answers = places.map(({ name, text }) => make("div", [make("p", name, { class: "hint" }), text]));
  get("both-turns").prepend(make("div", [make("p", question, { class: "question" }), make("div", answers, { class: "answers" })], { class: "turn" }));
  await attempt(get("both-error"), () =>
    Promise.all(
      [first, second].map(({ image }, i) => {
        const asked = [server.question(question, image.data)];
        const stream = server.streamAnswer(chosen("both-model"), asked, TOP_LOGPROBS, signal);
        return write(places[i].text, stream, places[i].name);
      }),
    ),
  );
});

// -- the library ------------------------------------------------------------------------------------------------------

let objectUrls = [];

async function search(query, said) {
  const signal = begin("search");
  get("search-status").textContent = "Searching …";
  const hits = await attempt(get("search-error"), () => server.search(query, signal));
  if (!hits) {
    if (runs.get("search").signal === signal) get("search-status").textContent = "";
    return;
  }
  for (const url of objectUrls) URL.revokeObjectURL(url);
  objectUrls = [];
  get("search-status").textContent = `${hits.length} image${hits.length === 1 ? "" : "s"} for ${said}, the best first.`;
  get("hits").replaceChildren(...hits.map((hit, i) => showHit(hit, i + 1, query, signal)));
}

function showHit(hit, number, { words }, signal) {
  const name = hit.captions[0] ?? `Result ${number}`;
  const image = make("img", [], { alt: name });
  const canvas = make("canvas", [], { "aria-hidden": "true" });
  canvas.hidden = true;
  const scores = [["ITC", hit.itc.toFixed(3)], ...(hit.itm === null ? [] : [["ITM", percent(hit.itm)]])];
  const looked = make("button", "Where it looked", { type: "button", class: "quiet", "aria-pressed": "false" });
  const open = make("button", "Open", { type: "button", class: "quiet" });
  for (const button of [looked, open]) button.setAttribute("aria-label", `${button.textContent}: ${name}`);
  looked.hidden = !able("rerank").length;
  const error = make("p", [], { class: "error", role: "alert" });
  const tools = make("div", [looked, open], { class: "hit-tools" });
  error.hidden = tools.hidden = true;
  attempt(error, async () => {
    const blob = await server.libraryImage(hit, signal);
    const url = URL.createObjectURL(blob);
    objectUrls.push(url);
    image.src = url;
    await image.decode();
    tools.hidden = false;
    open.addEventListener("click", () => {
      location.hash = "#image";
      place.read(blob, name);
    });
    let map = null;
    const draw = () => map && image.clientWidth && drawMapOver(image, canvas, map);
    new ResizeObserver(draw).observe(image); // another view may be open when the map arrives
    looked.addEventListener("click", async () => {
      const pressed = looked.getAttribute("aria-pressed") === "true";
      looked.setAttribute("aria-pressed", String(!pressed));
      canvas.hidden = pressed;
      if (pressed || canvas.dataset.drawn) return;
      const { data, url } = await readImage(blob, name);
      URL.revokeObjectURL(url);
      const found = await attempt(error, () => server.attention(able("rerank")[0].id, data, words, signal));
      if (!found) return looked.setAttribute("aria-pressed", "false");
      map = found.mean;
      canvas.dataset.drawn = "true";
      draw();
    });
  });
  const metadata = Object.entries(hit.metadata).slice(0, 3).map(([key, value]) => `${key}: ${value}`).join(", ");
  const lines = [
    make("dl", scores.map(([key, value]) => make("div", [make("dt", key), make("dd", value, { class: "number" })])), { class: "hit-scores" }),
    ...hit.captions.slice(0, 1).map((text) => make("p", text)),
    ...(metadata ? [make("p", metadata, { class: "name" })] : []),
    error,
    tools,
  ];
  return make("li", [make("div", [image, canvas], { class: "shown" }), make("div", lines, { class: "hit-text" })], { class: "hit" });
}

get("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = get("words").value.trim();
  if (words) search({ words }, `“${words}”`);
});
get("search-image").addEventListener("click", () => search({ image: place.image.data }, "the image that is open"));

// -- the page ---------------------------------------------------------------------------------------------------------

/** Return the view that the address names. The browser tells of a change later. */
function currentView() {
  const name = location.hash.slice(1);
  return Object.hasOwn(VIEWS, name) && (name !== "search" || offer?.library) ? name : "image";
}

function showView() {
  const view = currentView();
  closeWord();
  for (const each of Object.keys(VIEWS)) {
    get(`view-${each}`).hidden = each !== view || !offer;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[view]} | blip2`;
}

function askForKey(error) {
  get("key-form").hidden = false;
  if (offer === null && !get("key").value) return;
  showError(get("server-error"), error);
  get("key").select();
}

async function start() {
  showError(get("server-error"), null);
  try {
    offer = await server.describe();
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else showError(get("server-error"), error);
    return;
  }
  get("key-form").hidden = true;
  get("search-link").hidden = !offer.library;
  fillSelect("caption-model", able("caption"));
  // A model that needs a question was trained to answer; it is the first choice.
  const answerers = able("chat").sort((a, b) => a.tasks.includes("caption") - b.tasks.includes("caption"));
  fillSelect("ask-model", answerers);
  fillSelect("both-model", answerers);
  fillSelect("match-model", able("rerank"));
  showView();
}

get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.useKey(get("key").value);
  start();
});
// The view is in the fragment of the address, which the link to the content would change.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  get("main").focus();
});
window.addEventListener("hashchange", () => {
  showView();
  get("main").focus();
});
document.addEventListener("paste", (event) => {
  // Office programs copy a text together with an image of it.
  if (!offer || (event.target.matches?.("input, textarea") && event.clipboardData.types.includes("text/plain"))) return;
  const view = currentView();
  if (view === "search") return;
  const next = view === "image" ? place : first.image || first.isReading ? second : first;
  if (next.take(event.clipboardData)) event.preventDefault();
});
// A file that is dropped outside of a place is not opened in place of the page.
for (const type of ["dragover", "drop"]) window.addEventListener(type, (event) => event.preventDefault());

start();
