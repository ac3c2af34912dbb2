// The endpoints of the server, in the form that the page uses.

import { call, download, streamChat } from "./api.js";

export { useKey } from "./api.js";

const RESULTS = 24; // images of a search

/** Return the models with their tasks, and the library, if there is one. */
export async function describe() {
  const { data, search } = await call("v1/models");
  return { models: data, library: Boolean(search) };
}

/** A message of the user, with an image before the text if there is one. An image without a text asks for a caption. */
export function question(text, image) {
  const texts = text ? [{ type: "text", text }] : [];
  return { role: "user", content: image ? [{ type: "image_url", image_url: { url: image } }, ...texts] : text };
}

/** Yield the chunks of an answer to messages. */
export function streamAnswer(model, messages, topLogprobs, signal) {
  return streamChat({ model, messages, logprobs: true, top_logprobs: topLogprobs, return_token_ids: true }, signal);
}

/** Yield the chunks of a caption. */
export function streamCaption(model, image, topLogprobs, signal) {
  return streamAnswer(model, [question("", image)], topLogprobs, signal);
}

/** Return { mean, queries }: the attention of the queries as rows of weights. With a text, the queries read it too. */
export function attention(model, image, text, signal) {
  return call("v1/attention", { model, image, ...(text && { text }) }, signal);
}

/** Return { tokens, maps }: for each token of an answer, its probability without the image and the queries' effects. */
export function explain(model, messages, tokenIds) {
  return call("v1/explain", { model, messages, token_ids: tokenIds });
}

/** Return the ITC and ITM of texts about an image, the best first. */
export async function match(model, image, texts, signal) {
  const { results } = await call("v1/rerank", { model, query: { image }, documents: texts }, signal);
  return results.map(({ index, itc, itm }) => ({ text: texts[index], itc, itm }));
}

/** Return the similarity of two images, in [-1, 1]. */
export async function similarity(model, first, second, signal) {
  const { results } = await call("v1/rerank", { model, query: { image: first }, documents: [{ image: second }] }, signal);
  return results[0].itc;
}

/** Return the images of the library for words or for an image, the best first. */
export async function search({ words, image }, signal) {
  const { data } = await call("v1/search", { query: words ?? { image }, top_k: RESULTS, rerank_k: RESULTS }, signal);
  return data;
}

/** Return an image of the library as a Blob. */
export function libraryImage(hit, signal) {
  return download(hit.url.replace(/^\//, ""), signal);
}
