// Images that a person drops, pastes or chooses, and attention maps that are drawn over them.

const SIGNATURES = { "image/jpeg": /^\xff\xd8\xff/, "image/png": /^\x89PNG/, "image/webp": /^RIFF....WEBP/s };
const MAX_BYTES = 4 * 2 ** 20;
const MAX_SIDE = 2048; // of an image that is made smaller before it is sent

/** Read a Blob as an image: `url` to show it, `data` (a data URL) to send it. */
export async function readImage(blob, name) {
  const url = URL.createObjectURL(blob);
  const element = new Image();
  element.src = url;
  try {
    await element.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Error(`“${name}” is not an image that this browser can read. Choose a JPEG, PNG or WebP file.`);
  }
  try {
    const type = await findType(blob);
    const sent = type && blob.size <= MAX_BYTES ? new Blob([blob], { type }) : await shrink(element);
    return { name, url, element, data: await toDataUrl(sent) };
  } catch {
    URL.revokeObjectURL(url);
    throw new Error(`“${name}” cannot be read or made smaller by this browser. Choose a smaller image.`);
  }
}

/** Return the type of the bytes of an image that is sent as it is. The name of a file may say another. */
async function findType(blob) {
  const start = String.fromCharCode(...new Uint8Array(await blob.slice(0, 16).arrayBuffer()));
  return Object.keys(SIGNATURES).find((type) => SIGNATURES[type].test(start));
}

function shrink(element) {
  const scale = Math.min(1, MAX_SIDE / Math.max(element.naturalWidth, element.naturalHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(element.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(element.naturalHeight * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // as the server does with transparent images
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(element, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// -- attention --------------------------------------------------------------------------------------------------------

/** Return the mean of several maps, each a list of rows of numbers, with weights that sum to 1. */
export function meanMap(maps, weights = maps.map(() => 1 / maps.length)) {
  return maps[0].map((row, y) => row.map((_, x) => maps.reduce((sum, map, i) => sum + weights[i] * map[y][x], 0)));
}

/** Draw a map as darkness with the same brightness as `blip2.draw_attention`: one quarter where there is none. */
export function drawMap(canvas, map, width, height, image) {
  const grid = document.createElement("canvas");
  grid.width = map[0].length;
  grid.height = map.length;
  const pixels = new ImageData(grid.width, grid.height);
  const largest = Math.max(...map.flat(), 1e-12);
  map.flat().forEach((weight, i) => {
    pixels.data[4 * i + 3] = 255 * 0.75 * (1 - Math.max(weight, 0) / largest);
  });
  grid.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (image) context.drawImage(image, 0, 0, width, height);
  context.drawImage(grid, 0, 0, width, height);
}

/** Draw a map over an image of the page with `object-fit: contain`, on a canvas in the same place. */
export function drawMapOver(image, canvas, map) {
  const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  Object.assign(canvas.style, {
    left: `${image.offsetLeft + (image.clientWidth - width) / 2}px`,
    top: `${image.offsetTop + (image.clientHeight - height) / 2}px`,
    width: `${width}px`,
    height: `${height}px`,
  });
  const density = Math.min(window.devicePixelRatio || 1, 2);
  drawMap(canvas, map, Math.round(width * density), Math.round(height * density));
}

// -- a place for an image ---------------------------------------------------------------------------------------------

/** A place where an image can be dropped, pasted or chosen. `onImage` gets what `readImage` returns. */
export class ImagePlace {
  constructor(element, title, label, onImage) {
    this.onImage = onImage;
    this.image = null;
    this.reads = 0;
    this.isReading = false; // an image that was taken is not shown yet
    this.label = label;
    element.append(document.getElementById("drop-template").content.cloneNode(true));
    const find = (selector) => element.querySelector(selector);
    this.frame = find(".frame");
    this.input = find(".file");
    this.empty = find(".empty");
    this.shown = find(".shown");
    this.canvas = find("canvas");
    this.note = find("figcaption");
    this.tools = find(".tools");
    this.clear = find(".clear-map");
    this.error = find(".error");
    find(".empty-title").textContent = title;
    find(".change").addEventListener("click", () => this.input.click());
    this.clear.addEventListener("click", () => {
      this.hideMap();
      find(".change").focus();
    });
    this.input.addEventListener("change", () => {
      if (this.input.files.length) this.read(this.input.files[0]);
      this.input.value = ""; // so that the same file can be chosen again
    });
    for (const type of ["dragenter", "dragover"]) {
      this.frame.addEventListener(type, (event) => {
        event.preventDefault();
        this.frame.classList.add("over");
      });
    }
    this.frame.addEventListener("dragleave", () => this.frame.classList.remove("over"));
    this.frame.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      this.frame.classList.remove("over");
      this.take(event.dataTransfer);
    });
    new ResizeObserver(() => this.drawMap()).observe(this.shown);
  }

  /** Take the first image of a drop or of the clipboard. Return whether there is one. */
  take(transfer) {
    const file = [...transfer.files].find((each) => each.type.startsWith("image/")) ?? transfer.files[0];
    if (file) this.read(file);
    return Boolean(file);
  }

  async read(blob, name = blob.name || "image") {
    showError(this.error, null);
    const number = ++this.reads;
    this.isReading = true;
    let image;
    try {
      image = await readImage(blob, name);
    } catch (error) {
      if (number !== this.reads) return;
      this.isReading = false;
      showError(this.error, error);
      return;
    }
    if (number !== this.reads) return URL.revokeObjectURL(image.url); // a later image was read faster
    this.isReading = false;
    this.show(image);
  }

  show(image) {
    if (this.image) URL.revokeObjectURL(this.image.url);
    this.image = image;
    const shown = this.shown.querySelector("img");
    shown.src = image.url;
    shown.alt = `${this.label}: ${image.name}`;
    const hadFocus = document.activeElement === this.input;
    this.empty.hidden = true;
    this.shown.hidden = this.tools.hidden = false;
    // The input stays outside of what is hidden, for the button that changes the image.
    this.frame.append(this.input);
    this.input.tabIndex = -1;
    this.input.setAttribute("aria-hidden", "true");
    if (hadFocus) this.tools.querySelector(".change").focus();
    this.hideMap();
    this.onImage(image);
  }

  /** Whether most of the image is on the screen. */
  get isInSight() {
    const { top, bottom, height } = this.shown.getBoundingClientRect();
    return Math.min(bottom, window.innerHeight) - Math.max(top, 0) > height / 2;
  }

  /** Draw a map over the image, with a note that says what it is. */
  showMap(map, note) {
    this.map = { map, note };
    this.clear.hidden = false;
    this.drawMap();
  }

  /** Draw another map until the preview ends, which a call without arguments does. */
  previewMap(map, note) {
    this.preview = map ? { map, note } : null;
    this.drawMap();
  }

  hideMap() {
    this.map = this.preview = null;
    this.clear.hidden = true;
    this.drawMap();
    this.frame.dispatchEvent(new CustomEvent("map-hidden"));
  }

  drawMap() {
    const shown = this.shown.querySelector("img");
    const { map, note } = this.preview ?? this.map ?? {};
    this.note.textContent = note ?? "";
    this.canvas.hidden = !map;
    if (!map || !shown.clientWidth) return;
    drawMapOver(shown, this.canvas, map);
  }
}

/** Show an error in its place, or hide it if it is null. */
export function showError(place, error) {
  place.hidden = !error || error.name === "AbortError";
  place.textContent = place.hidden ? "" : error.message;
}
