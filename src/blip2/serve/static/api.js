// Requests to the server that this page comes from. Paths are relative, so that a proxy may put it under any prefix.

let key = "";

/** Use an API key from now on. It is kept in this variable only. */
export function useKey(value) {
  key = value;
}

/** An error of the server, with the message that the server gave. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request, and return the response. With a body, it is a POST of JSON. */
async function request(path, body, signal) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const options = { headers, signal, method: body === undefined ? "GET" : "POST", body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Check that it is running, then try again.");
  }
  if (!response.ok) throw new ServerError(response.status, await errorMessage(response));
  return response;
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || `The server answers with status ${response.status}.`;
  }
}

/** Return the JSON that the server answers. */
export async function call(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** Return a file of the server as a Blob. */
export async function download(path, signal) {
  return (await request(path, undefined, signal)).blob();
}

/** Yield the chunks of a chat completion, each as soon as it arrives. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    pending = (pending + value).replaceAll("\r\n", "\n");
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(response.status, chunk.error.message);
      yield chunk;
    }
  }
  throw new ServerError(0, "The server ended the answer before it was complete. Try again.");
}
