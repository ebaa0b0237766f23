/** The server in a corner: ready or not, its models, their queues, how long requests take. */

import { listModels, metricsText, readiness } from "./api";
import { describe, Model, PageError } from "./model";

const EVERY_MS = 5000;
const DURATIONS = "mmdet3d_serve_version_request_duration_seconds";

/** Sum and number of the requests of a model's version, and how many took at most so many seconds. */
export interface Latency {
  seconds: number;
  requests: number;
  buckets: Map<number, number>;
}

/** Read a histogram of the metrics, by model and version; several gateway processes are added. */
export function readLatencies(text: string): Map<string, Latency> {
  const found = new Map<string, Latency>();
  const line = new RegExp(`^${DURATIONS}_(sum|count|bucket)\\{([^}]*)\\} (\\S+)$`, "gm");
  for (const [, kind, labels, value] of text.matchAll(line)) {
    const [model, version] = ["model", "version"].map((name) => new RegExp(`(?:^|,)${name}="([^"]*)"`).exec(labels)?.[1]);
    if (!model) continue;
    const latency = found.get(`${model} ${version}`) ?? { seconds: 0, requests: 0, buckets: new Map() };
    found.set(`${model} ${version}`, latency);
    if (kind === "sum") latency.seconds += Number(value);
    else if (kind === "count") latency.requests += Number(value);
    else {
      const bound = Number(/le="([^"]*)"/.exec(labels)?.[1].replace("+Inf", "Infinity"));
      latency.buckets.set(bound, (latency.buckets.get(bound) ?? 0) + Number(value));
    }
  }
  return found;
}

/** The least bound that so much of the requests kept, seconds. */
export function quantile({ buckets, requests }: Latency, share: number): number {
  for (const [bound, count] of [...buckets].sort((a, b) => a[0] - b[0])) if (count >= share * requests) return bound;
  return Infinity;
}

export class ServerState {
  /** Called with the models whenever they were read. */
  onModels: (models: Model[]) => void = () => {};
  /** Called when the server wants a key, or does not know the one that was given. */
  onKeyNeeded: () => void = () => {};
  private timer = 0;

  constructor(
    private readonly summary: HTMLElement,
    private readonly details: HTMLElement,
  ) {
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Read the state now, and every few seconds while the page is seen. */
  async refresh(): Promise<void> {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      const [reasons, models, metrics] = await Promise.all([readiness(), listModels(), metricsText()]);
      this.onModels(models);
      this.show(reasons, models, readLatencies(metrics));
    } catch (error) {
      if (error instanceof PageError && error.status === 401) {
        this.say("key", "API key needed");
        this.onKeyNeeded();
        return;
      }
      const isUnreachable = error instanceof PageError && error.code === "unreachable";
      this.say("down", isUnreachable ? "cannot be reached; asked again every 5 s" : describe(error));
    }
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => void this.refresh(), EVERY_MS);
  }

  private show(reasons: string[], models: Model[], latencies: Map<string, Latency>): void {
    const waiting = models.reduce((sum, model) => sum + (model.waiting ?? 0), 0);
    if (reasons.length) this.say("down", `not ready: ${reasons.join(", ")}`);
    else this.say("ready", `ready · ${models.length} model${models.length === 1 ? "" : "s"} · ${waiting} waiting`);
    const rows = models.map((model) => {
      const title = `${model.name} ${model.version}`;
      const latency = latencies.get(title);
      const cells = [
        title,
        model.reason ?? model.status,
        `${model.workers.ready}/${model.workers.all}`,
        `${model.waiting ?? 0} + ${model.running ?? 0}`,
        latency?.requests ? `${milliseconds(latency.seconds / latency.requests)}` : "–",
        latency?.requests ? `≤ ${milliseconds(quantile(latency, 0.95))}` : "–",
      ];
      const row = document.createElement("tr");
      row.append(...cells.map((text, k) => cell(text, k ? "td" : "th")));
      return row;
    });
    this.details.replaceChildren(...rows);
  }

  private say(state: "ready" | "down" | "key", text: string): void {
    this.summary.dataset.state = state;
    if (this.summary.textContent !== text) this.summary.textContent = text;
  }
}

function cell(text: string, tag: "td" | "th"): HTMLElement {
  const made = document.createElement(tag);
  if (tag === "th") made.setAttribute("scope", "row");
  made.textContent = text;
  return made;
}

export function milliseconds(seconds: number): string {
  if (!Number.isFinite(seconds)) return "over 60 s";
  return seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
}
