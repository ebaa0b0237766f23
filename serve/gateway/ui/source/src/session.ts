/** The frames of the page and their answers: sent a few at a time, each once. */

import { predict } from "./api";
import { asJson } from "./calibration";
import { Detection, listDetections } from "./detections";
import { Frame, partsFor } from "./frames";
import { Answer, describe, Model, Timing } from "./model";
import { timesOf } from "./times";

/** Requests that wait for an answer at a time. */
const AT_ONCE = 2;

export interface Entry {
  frame: Frame;
  state: "waiting" | "running" | "done" | "failed";
  answer?: Answer;
  detections: Detection[];
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
  /** Loops of `work` that send frames at present; those of a former sending do not count. */
  private working = 0;

  /** Replace all frames, and send them. */
  setFrames(frames: Frame[]): void {
    this.entries = frames.map((frame) => ({ frame, state: "waiting", detections: [] }));
    this.sendAll();
  }

  /** Send all frames anew, to the present model with the present options. */
  sendAll(): void {
    this.cancel();
    this.stop = new AbortController();
    this.working = 0;
    this.queue(this.entries);
  }

  /** Send those that failed once more; of a track session all, in which the order counts. */
  sendFailed(): void {
    if (this.options.track_session) this.sendAll();
    else this.queue(this.entries.filter((entry) => entry.state === "failed"));
  }

  private queue(entries: Entry[]): void {
    for (const entry of entries) {
      Object.assign(entry, { state: "waiting", answer: undefined, detections: [], timing: undefined, error: undefined });
      this.onChange(entry);
    }
    // The frames of a track session go one after the other: their order is that of the tracks.
    const idle = (this.options.track_session ? 1 : AT_ONCE) - this.working;
    for (let k = 0; this.model && k < idle; k++) {
      this.working++;
      void this.work(this.model, this.stop.signal);
    }
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
      if (signal.aborted) return;
      if (!entry) {
        this.working--;
        return;
      }
      entry.state = "running";
      this.onChange(entry);
      try {
        const options = { ...this.options, ...this.trackOptions(entry, isOpen, times) };
        const { answer, timing } = await predict(model, await asJson(partsFor(entry.frame, model)), options, signal);
        isOpen = true;
        if (signal.aborted) return;
        Object.assign(entry, { state: "done", answer, detections: listDetections(answer), timing });
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
