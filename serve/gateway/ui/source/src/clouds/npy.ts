/** NumPy's .npy, plain or structured (numpy.lib.format, versions 1 to 3). */

import { PageError } from "../model";
import { arrange, Cloud } from "./cloud";

type Read = (view: DataView, at: number, little: boolean) => number;

const READERS: Record<string, Read> = {
  f4: (view, at, little) => view.getFloat32(at, little),
  f8: (view, at, little) => view.getFloat64(at, little),
  i1: (view, at) => view.getInt8(at),
  i2: (view, at, little) => view.getInt16(at, little),
  i4: (view, at, little) => view.getInt32(at, little),
  i8: (view, at, little) => Number(view.getBigInt64(at, little)),
  u1: (view, at) => view.getUint8(at),
  u2: (view, at, little) => view.getUint16(at, little),
  u4: (view, at, little) => view.getUint32(at, little),
  u8: (view, at, little) => Number(view.getBigUint64(at, little)),
};

interface Kind {
  read: Read;
  bytes: number;
  little: boolean;
}

/** Kind of a number by its code in NumPy; of padding, which has no name, nothing but its length counts. */
function kindOf(text: string, isPadding = false): Kind {
  const read = READERS[text.slice(1)] ?? (isPadding && text[1] === "V" ? () => NaN : null);
  if (!read) throw new PageError(`the array holds ${text}, which is no number that the page reads`);
  return { read, bytes: Number(text.slice(2)), little: text[0] !== ">" };
}

/** Compare what a header claims with what there is: a claim alone may not take memory. */
function checkBytes(view: DataView, start: number, count: number, stride: number): void {
  if (!Number.isSafeInteger(count) || count < 0 || !(start + count * stride <= view.byteLength)) {
    throw new PageError(`the header claims ${count} points of ${stride} bytes, ${view.byteLength - start} bytes follow`);
  }
}

export function readNpy(buffer: ArrayBuffer, columns: (width: number) => string[]): Cloud {
  const view = new DataView(buffer);
  const isLong = view.getUint8(6) > 1;
  const start = isLong ? 12 + view.getUint32(8, true) : 10 + view.getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, isLong ? 12 : 10, start - (isLong ? 12 : 10)));
  const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").filter((word) => word.trim()).map(Number);
  const plain = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  if (plain) {
    if (shape.length !== 2) throw new PageError(`a cloud is an array (N, columns), this one has shape ${shape}`);
    const [count, width] = shape;
    const { read, bytes, little } = kindOf(plain);
    checkBytes(view, start, count, bytes * width);
    const isFortran = /'fortran_order':\s*True/.test(header);
    return arrange(count, columns(width), (row, column) =>
      read(view, start + bytes * (isFortran ? column * count + row : row * width + column), little),
    );
  }
  const described = /'descr':\s*\[(.*)\],\s*'fortran_order'/s.exec(header)?.[1] ?? "";
  const FIELD = /\('([^']*)',\s*'([^']+)'\),?\s*/g;
  // Fields of several numbers, of fields and with titles are left to the server.
  if (!described || described.replace(FIELD, "")) throw new PageError("the page does not read such columns");
  const fields = [...described.matchAll(FIELD)].map(([, name, kind]) => ({ name, ...kindOf(kind, !name) }));
  const stride = fields.reduce((sum, field) => sum + field.bytes, 0);
  checkBytes(view, start, shape[0] ?? 0, stride);
  const offsets = fields.map((_, k) => fields.slice(0, k).reduce((sum, field) => sum + field.bytes, 0));
  return arrange(
    shape[0] ?? 0,
    fields.map((field) => field.name),
    (row, column) => fields[column].read(view, start + row * stride + offsets[column], fields[column].little),
  );
}
