/** The frames of the page and their answers: sent a few at a time, each once. */

import { predict } from "./api";
import { asJson } from "./calibration";
import { Detection, listDetections } from "./detections";
import { Frame, partsFor } from "./frames";
import { decodePointLabels, decodeSegments, SegmentMap } from "./masks";
import { Answer, describe, Model, Timing } from "./model";
import { timesOf } from "./times";

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
    // The frames of a track session go one after the other: their order is that of the tracks.
    const count = this.options.track_session ? 1 : AT_ONCE;
    if (this.model) for (let k = 0; k < count; k++) void this.work(this.model, this.stop.signal);
  }

  cancel(): void {
    this.stop.abort();
  }

  /** Send waiting frames one after the other. */
  private async work(model: Model, signal: AbortSignal): Promise<void> {
    let isOpen = false;
    const times = timesOf(this.entries.map(({ frame }) => frame.name));
    for (;;) {
      const entry = this.entries.find((each) => each.state === "waiting");
      if (!entry || signal.aborted) return;
      entry.state = "running";
      this.onChange(entry);
      try {
        const options = { ...this.options, ...this.trackOptions(entry, isOpen, times) };
        const { answer, timing } = await predict(model, await asJson(partsFor(entry.frame, model)), options, signal);
        isOpen = true;
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

  /** Open the track session with the first frame that is answered, and end it with the last one. */
  private trackOptions(entry: Entry, isOpen: boolean, times?: number[]): Record<string, string> {
    if (!this.options.track_session) return {};
    return {
      ...(!isOpen && { track_start: "true" }),
      ...(entry === this.entries.at(-1) && { track_end: "true" }),
      ...(times && { frame_time_s: String(times[this.entries.indexOf(entry)]) }),
    };
  }
}
