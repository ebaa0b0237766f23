/** The frames of the page and their answers: sent a few at a time, each once. */

import { predict } from "./api";
import { asJson } from "./calibration";
import { Detection, listDetections } from "./detections";
import { Frame, partsFor } from "./frames";
import { decodePointLabels, decodeSegments, SegmentMap } from "./masks";
import { Answer, describe, Model, Timing } from "./model";

/** Requests that wait for an answer at a time. */
const AT_ONCE = 2;

export interface Entry {
  frame: Frame;
  state: "waiting" | "running" | "done" | "failed";
  answer?: Answer;
  detections: Detection[];
  pointLabels?: ArrayLike<number>;
  segments?: SegmentMap | null;
  timing?: Timing;
  error?: string;
}

export class Session {
  entries: Entry[] = [];
  model: Model | null = null;
  /** Options of the requests, by their name in the query. */
  options: Record<string, string> = {};
  /** Called when an entry has changed. */
  onChange: (entry: Entry) => void = () => {};
  private stop = new AbortController();

  /** Replace all frames, and send them. */
  setFrames(frames: Frame[]): void {
    this.entries = frames.map((frame) => ({ frame, state: "waiting", detections: [] }));
    this.sendAll();
  }

  /** Send all frames anew, to the present model with the present options. */
  sendAll(): void {
    this.cancel();
    this.stop = new AbortController();
    for (const entry of this.entries) {
      Object.assign(entry, { state: "waiting", answer: undefined, detections: [], timing: undefined, error: undefined });
      entry.pointLabels = entry.segments = undefined;
      this.onChange(entry);
    }
    if (this.model) for (let k = 0; k < AT_ONCE; k++) void this.work(this.model, this.stop.signal);
  }

  cancel(): void {
    this.stop.abort();
  }

  /** Send waiting frames one after the other. */
  private async work(model: Model, signal: AbortSignal): Promise<void> {
    for (;;) {
      const entry = this.entries.find((each) => each.state === "waiting");
      if (!entry || signal.aborted) return;
      entry.state = "running";
      this.onChange(entry);
      try {
        const { answer, timing } = await predict(model, await asJson(partsFor(entry.frame, model)), this.options, signal);
        const segments = await decodeSegments(answer);
        if (signal.aborted) return;
        const pointLabels = answer.pts_semantic_mask && decodePointLabels(answer.pts_semantic_mask);
        const detections = listDetections(answer);
        Object.assign(entry, { state: "done", answer, detections, pointLabels, segments, timing });
      } catch (error) {
        if (signal.aborted) return;
        Object.assign(entry, { state: "failed", error: describe(error) });
      }
      this.onChange(entry);
    }
  }
}
