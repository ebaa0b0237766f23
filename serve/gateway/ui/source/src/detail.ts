/** How many points are drawn while the view moves: as many as this machine draws in time; all of them when it rests. */

import { BufferAttribute, BufferGeometry } from "three";

/** Aim for a picture while the view moves, and the rest after which it is drawn whole, milliseconds. */
const AIM_MS = 30;
const REST_MS = [300, 1500];
const LEAST = 20_000;

export class Detail {
  private order: BufferAttribute | null = null;
  private geometry = new BufferGeometry();
  private count = 0;
  private budget = Infinity;
  private askedAt = 0;
  /** The longest of the last waits, which is forgotten bit by bit; milliseconds. */
  private slowest = 0;
  private isMoving = false;
  private timer = 0;

  /** Draw all when the view has come to rest. */
  constructor(private readonly onRest: () => void) {}

  /** Take another cloud. */
  use(geometry: BufferGeometry, count: number): void {
    this.geometry = geometry;
    this.count = count;
    this.order = null;
  }

  /** The view moves: from now on draw what can be drawn in time. */
  move(): void {
    clearTimeout(this.timer);
    this.isMoving = true;
    if (this.count <= LEAST || this.budget >= this.count) return;
    this.order ??= new BufferAttribute(shuffled(this.count), 1);
    this.geometry.setIndex(this.order);
    this.geometry.setDrawRange(0, this.budget);
  }

  /** A picture is asked for. */
  ask(): void {
    this.askedAt = performance.now();
  }

  /** A picture begins: it waited for those before it, whose points are still being drawn. */
  measure(): void {
    if (!this.isMoving) return;
    const took = performance.now() - this.askedAt;
    this.slowest = Math.max(took, 0.8 * this.slowest);
    // From the picture on, not from the movement: a slow one is waited for.
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => this.rest(), Math.min(Math.max(REST_MS[0], 4 * this.slowest), REST_MS[1]));
    const drawn = Math.min(this.budget, this.count);
    if (took > 1.3 * AIM_MS) this.budget = Math.max(LEAST, Math.round(drawn * Math.max(AIM_MS / took, 0.1)));
    else if (took < 0.7 * AIM_MS) this.budget = drawn < this.count ? Math.round(drawn * 1.5) : Infinity;
  }

  private rest(): void {
    this.isMoving = false;
    this.geometry.setIndex(null);
    this.geometry.setDrawRange(0, Infinity);
    this.onRest();
  }

  /** Number of points of the next picture. */
  get drawn(): number {
    return Math.min(this.geometry.drawRange.count, this.count);
  }
}

/** Positions in an order of which every beginning is a fair sample. */
function shuffled(count: number): Uint32Array {
  const order = Uint32Array.from({ length: count }, (_, k) => k);
  for (let k = count - 1; k > 0; k--) {
    const other = Math.floor(Math.random() * (k + 1));
    [order[k], order[other]] = [order[other], order[k]];
  }
  return order;
}
