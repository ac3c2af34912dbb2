// Texts whose words show their probabilities and alternatives.

const details = document.getElementById("details");
let opened = null;
let openings = 0;

/** Group tokens (the entries of `logprobs.content`) into words, each with the spaces before it. */
export function toWords(tokens) {
  const words = [];
  const decoder = new TextDecoder();
  for (const token of tokens) {
    const bytes = token.bytes ?? [...new TextEncoder().encode(token.token)];
    const text = new TextDecoder().decode(new Uint8Array(bytes));
    const last = words.at(-1);
    // A token that is a part of a character, or that begins with a letter after a letter, continues the word.
    const continues = last && !/^\s/.test(text) && (text.includes("\ufffd") || (/^[\p{L}\p{N}]/u.test(text) && /[\p{L}\p{N}\ufffd]$/u.test(last.text)));
    if (continues) {
      last.bytes.push(...bytes);
      last.tokens.push(token);
      last.text = decoder.decode(new Uint8Array(last.bytes));
    } else {
      words.push({ text, bytes: [...bytes], tokens: [token] });
    }
  }
  for (const word of words) word.probability = Math.exp(word.tokens.reduce((sum, each) => sum + each.logprob, 0));
  return words;
}

/** Write a probability as a percentage. */
export function percent(probability) {
  const value = 100 * probability;
  return value >= 99.95 ? "100 %" : value < 0.1 ? "< 0.1 %" : `${value.toFixed(value < 10 ? 1 : 0)} %`;
}

/**
 * Show a text as words that open their details. `text` is what the server wrote; `tokens` its log-probabilities.
 * `onWord` gets the index of the word that is pointed at, and null when none is; it may return a promise of more elements
 * of the details.
 */
export function showWords(place, text, tokens, label, onWord) {
  place.replaceChildren();
  const words = toWords(tokens ?? []);
  const joined = words.map((word) => word.text).join("");
  // The text ends before an end token or a stop string.
  if (!words.length || !joined.trimStart().startsWith(text.trim())) {
    place.textContent = text;
    return [];
  }
  const group = document.createElement("span");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `${label}, with the probability of each word. The arrow keys move between the words.`);
  const buttons = [];
  let length = 0;
  for (const [index, word] of words.entries()) {
    const start = word.text.trimStart();
    const space = word.text.slice(0, word.text.length - start.length);
    if (length) group.append(space);
    if (length >= text.trim().length) break;
    length += (length ? space.length : 0) + start.length;
    if (!start) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = `word ${word.probability < 0.5 ? "unsure" : word.probability < 0.9 ? "medium" : ""}`.trim();
    button.textContent = start;
    button.tabIndex = buttons.length ? -1 : 0;
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-label", `${start}, ${percent(word.probability)}`);
    const open = async () => {
      if (opened === button) return;
      openDetails(button, word);
      const opening = ++openings;
      const more = await onWord?.(index, word);
      if (!more || opened !== button || opening !== openings) return;
      details.append(...more);
      placeDetails(button);
    };
    const close = () => {
      if (opened !== button) return;
      closeDetails();
      onWord?.(null);
    };
    button.addEventListener("pointerenter", open);
    button.addEventListener("focus", open);
    button.addEventListener("click", open);
    button.addEventListener("pointerleave", () => document.activeElement !== button && close());
    button.addEventListener("blur", close);
    button.closeWord = close;
    button.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return close();
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = step ? buttons[buttons.indexOf(button) + step] : { Home: buttons[0], End: buttons.at(-1) }[event.key];
      if (!next) return;
      event.preventDefault();
      button.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    buttons.push(button);
    group.append(button);
  }
  place.append(group);
  return words;
}

// A tap outside of the words does not take the focus from them in every browser.
document.addEventListener("pointerdown", (event) => {
  if (opened && !opened.contains(event.target) && !details.contains(event.target)) opened.closeWord();
});

/** Close the details if they are open: their word may be removed. */
export function closeWord() {
  opened?.closeWord();
}

function openDetails(button, word) {
  closeWord();
  opened = button;
  button.setAttribute("aria-expanded", "true");
  button.setAttribute("aria-describedby", "details");
  details.replaceChildren(paragraph(`${percent(word.probability)} sure of “${word.text.trim()}”`, "strong"));
  for (const token of word.tokens) {
    if (word.tokens.length > 1) details.append(paragraph(`“${token.token}”`));
    if (token.top_logprobs?.length) details.append(bars(token));
  }
  details.hidden = false;
  placeDetails(button);
}

/** Put the details below a word, or above it where there is no room below. */
function placeDetails(button) {
  const box = button.getClientRects()[0];
  const left = Math.min(Math.max(box.left, 16), document.documentElement.clientWidth - details.offsetWidth - 16);
  const below = box.bottom + 6 + details.offsetHeight <= window.innerHeight || box.top < details.offsetHeight + 6;
  details.style.left = `${left + window.scrollX}px`;
  details.style.top = `${(below ? box.bottom + 6 : box.top - details.offsetHeight - 6) + window.scrollY}px`;
}

function closeDetails() {
  opened?.setAttribute("aria-expanded", "false");
  opened?.removeAttribute("aria-describedby");
  opened = null;
  details.hidden = true;
}

/** A paragraph of the details. */
export function paragraph(text, tag = "span") {
  const element = document.createElement("p");
  const inner = document.createElement(tag);
  inner.textContent = text;
  element.append(inner);
  return element;
}

function bars(token) {
  const list = document.createElement("dl");
  list.className = "bars";
  const shown = token.top_logprobs.some((each) => each.token === token.token)
    ? token.top_logprobs
    : [...token.top_logprobs, token];
  for (const each of shown) {
    const term = document.createElement("dt");
    term.textContent = each.token.trim() || (each.token ? "space" : "end");
    if (each.token === token.token) term.className = "chosen";
    const value = document.createElement("dd");
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = percent(Math.exp(each.logprob));
    value.append(bar(Math.exp(each.logprob)), number);
    list.append(term, value);
  }
  return list;
}

/** A bar for a share in [0, 1]. */
export function bar(share) {
  const element = document.createElement("span");
  element.className = "bar";
  element.style.setProperty("--share", Math.min(Math.max(share, 0), 1));
  return element;
}
