/** Calls of the gateway; the key is held in memory only and sent as X-API-Key. */

import { Answer, Model, PageError, Timing } from "./model";

/** Longest pause before each repetition of a request, seconds; those of the Python client. */
const PAUSES_S = [0.2, 0.5, 1, 2];
/** A frame is given up rather than kept waiting for longer, seconds. */
const LONGEST_PAUSE_S = 60;

let key = "";

export interface Prediction {
  answer: Answer;
  timing: Timing;
  requestId: string;
}

/** Use another key from now on; an empty one sends none. */
export function setKey(value: string): void {
  key = value.trim();
}

export function hasKey(): boolean {
  return key !== "";
}

/** Resolve a path of the gateway; relative, so that a proxy may serve it below a prefix. */
function address(path: string): string {
  return new URL(path, document.baseURI).href;
}

/** Ask the gateway; `files` are those of the body, which may have changed on the disk since they were opened. */
async function call(path: string, request: RequestInit = {}, files: Blob[] = [], alsoFine = 200): Promise<Response> {
  const headers = new Headers(request.headers);
  if (key) headers.set("X-API-Key", key);
  let answer: Response;
  try {
    answer = await fetch(address(path), { ...request, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (request.signal?.aborted) throw error;
    // A browser that cannot read a file while it sends it says no more than one that finds no server.
    for (const file of files) await file.slice(0, 1).arrayBuffer();
    throw new PageError(
      `${new URL(address("")).host} cannot be reached; check that the server runs, and send the frame again`, "unreachable",
    );
  }
  if (!answer.ok && answer.status !== alsoFine) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer: Response): Promise<PageError> {
  const requestId = answer.headers.get("x-request-id") ?? "";
  const retryAfter = secondsOf(answer.headers.get("retry-after") ?? "");
  const text = await answer.text();
  try {
    const { code, message } = JSON.parse(text).error;
    return new PageError(message, code, answer.status, requestId, retryAfter);
  } catch {
    return new PageError(text.slice(0, 300) || answer.statusText, "", answer.status, requestId, retryAfter);
  }
}

/** Seconds of a Retry-After, which is a number of them or a date; 0 without one. */
function secondsOf(header: string): number {
  const seconds = /^\s*\d+\s*$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(seconds || 0, 0);
}

export async function listModels(): Promise<Model[]> {
  const listed: Model[] = await (await call("models")).json();
  return listed.filter((model) => model.name);
}

/** Reasons why the server is not ready; none if it is. */
export async function readiness(): Promise<string[]> {
  const { ready, reasons } = await (await call("health/ready", {}, [], 503)).json();
  return ready ? [] : reasons;
}

export async function metricsText(): Promise<string> {
  return (await call("metrics")).text();
}

/** Send one frame; again, after the time that the server asks for, if that has too much to do or is not ready (429, 503). */
export async function predict(
  model: Model,
  parts: Map<string, File>,
  options: Record<string, string>,
  signal: AbortSignal,
): Promise<Prediction> {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== ""));
  const path = `predictions/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}?${query}`;
  for (let tries = 1; ; tries++) {
    const began = performance.now();
    try {
      const answer = await call(path, { method: "POST", body: bodyOf(parts), signal }, [...parts.values()]);
      const prediction = await readAnswer(answer);
      const timing = readTiming(answer.headers.get("server-timing") ?? "");
      timing.total = performance.now() - began;
      return { answer: prediction, timing, requestId: answer.headers.get("x-request-id") ?? "" };
    } catch (error) {
      const pauseS = error instanceof PageError ? pauseBefore(tries, error) : Infinity;
      if (pauseS > LONGEST_PAUSE_S) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * pauseS));
      signal.throwIfAborted();
    }
  }
}

/** Seconds before the next try; a random part keeps pages from coming back together. */
function pauseBefore(tries: number, error: PageError): number {
  if (![429, 503].includes(error.status) || tries > PAUSES_S.length) return Infinity;
  const spread = 0.5 + Math.random() / 2;
  return Math.max(PAUSES_S[tries - 1] * spread, error.retryAfter * (0.5 + spread));
}

async function readAnswer(answer: Response): Promise<Answer> {
  const text = await answer.text();
  try {
    return JSON.parse(text);
  } catch {
    throw new PageError(`the answer is not that of a prediction: ${text.slice(0, 100)}`, "no_answer", answer.status);
  }
}

/** A frame of one part is the body itself, which needs no form. */
function bodyOf(parts: Map<string, File>): BodyInit {
  if (parts.size === 1) return new Blob([[...parts.values()][0]], { type: "application/octet-stream" });
  const form = new FormData();
  for (const [name, file] of parts) form.append(name, file, file.name);
  return form;
}

export interface DecodedPoints {
  columns: string[];
  values: Float32Array;
}

/** Let the server decode a cloud that the page has no reader for. */
export async function decodePoints(file: Blob, signal?: AbortSignal): Promise<DecodedPoints> {
  const body = new Blob([file], { type: "application/octet-stream" });
  const answer = await call("ui/points", { method: "POST", body, signal }, [file]);
  const columns = (answer.headers.get("x-columns") ?? "x,y,z").split(",");
  return { columns, values: new Float32Array(await answer.arrayBuffer()) };
}

/** Let the server decode an image that this browser does not read. */
export async function decodeImage(file: Blob): Promise<Blob> {
  const body = new Blob([file], { type: "application/octet-stream" });
  const answer = await call("ui/image", { method: "POST", body }, [file]);
  return answer.blob();
}

/** Read a Server-Timing header: `decode;dur=0.3, queue;dur=…`. */
export function readTiming(header: string): Timing {
  const timing: Timing = {};
  for (const [, stage, milliseconds] of header.matchAll(/([\w-]+);dur=([\d.]+)/g)) {
    timing[stage] = Number(milliseconds);
  }
  return timing;
}
