/** Times of frames: Unix times in their names, as recorders write them (docs/tracking.md#times). */

const UNIX_TIME = /(?<!\d)(\d{10}(?:\.\d+)?|\d{13}|\d{16}|\d{19})(?!\d)/g;
/** From 2000 to 2100, seconds. */
const [FIRST_S, LAST_S] = [946_684_800, 4_102_444_800];

/** Times of frames in seconds; none if a name has none, or they do not rise. */
export function timesOf(names: string[]): number[] | undefined {
  const times = names.map(timeOf);
  return times.every((time, k) => k === 0 || time > times[k - 1]) && times.every(Number.isFinite) ? times : undefined;
}

/** The last Unix time in a name, in seconds: 10 digits of seconds, 13 of milli-, 16 of micro-, 19 of nanoseconds. */
function timeOf(name: string): number {
  const digits = [...name.matchAll(UNIX_TIME)].at(-1)?.[1] ?? "";
  const whole = digits.split(".")[0].length;
  const time = Number(digits) / 10 ** (whole - 10);
  return time >= FIRST_S && time < LAST_S ? time : NaN;
}
