/** Plays the frames one after the other; waits for a frame that has no answer yet. */

import { byId } from "./dom";

export class Player {
  /** Shows a frame; resolves when it is seen. */
  onMove: (index: number) => Promise<void> = async () => {};
  /** Whether a frame can be shown with its answer. */
  isReady: (index: number) => boolean = () => true;
  index = 0;
  private count = 0;
  /** Ends the present run; null while nothing is played. */
  private playing: AbortController | null = null;
  private readonly play = byId("play");
  private readonly position = byId<HTMLInputElement>("position");
  private readonly rate = byId<HTMLInputElement>("rate");

  constructor() {
    this.play.addEventListener("click", () => (this.playing ? this.pause() : void this.run()));
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    this.position.addEventListener("input", () => {
      this.pause();
      void this.moveTo(this.position.valueAsNumber);
    });
  }

  setCount(count: number): void {
    this.pause();
    this.count = count;
    this.index = 0;
    this.position.max = String(Math.max(count - 1, 0));
    byId("player").hidden = count < 2;
  }

  async moveTo(index: number): Promise<void> {
    this.index = index;
    this.position.value = String(index);
    const text = `${index + 1} / ${this.count}`;
    byId("position-text").textContent = text;
    this.position.setAttribute("aria-valuetext", `frame ${index + 1} of ${this.count}`);
    await this.onMove(index);
  }

  pause(): void {
    this.playing?.abort();
    this.playing = null;
    this.show();
  }

  private step(by: number): void {
    this.pause();
    void this.moveTo((this.index + by + this.count) % this.count);
  }

  private async run(): Promise<void> {
    this.playing = new AbortController();
    const { signal } = this.playing;
    this.show();
    if (this.index === this.count - 1) this.index = -1;
    while (!signal.aborted && this.index < this.count - 1) {
      const next = this.index + 1;
      const due = performance.now() + 1000 / Math.min(Math.max(this.rate.valueAsNumber || 4, 0.5), 30);
      if (this.isReady(next)) await this.moveTo(next);
      await new Promise((resolve) => setTimeout(resolve, Math.max(due - performance.now(), 0)));
    }
    // A run that was paused ends here although another one may have begun.
    if (!signal.aborted) this.pause();
  }

  private show(): void {
    this.play.textContent = this.playing ? "Pause" : "Play";
    this.play.dataset.playing = String(this.playing !== null);
  }
}
