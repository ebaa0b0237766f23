/**
 * A file to a cloud: by its first bytes, as the server does it (serve/protocol/point_signatures.py). .bin, .npy, PCD and
 * PLY are read here; the others, and what a reader here does not understand, by the server.
 */

import { decodePoints } from "../api";
import { BoxKind, Model, PageError } from "../model";
import { arrange, Cloud, spellingOf, usualColumns } from "./cloud";
import { readPcd, readPly } from "./loaders";
import { readNpy } from "./npy";

/** What the numbers of a file without names mean. */
export interface Layout {
  width: number;
  /** The frame of the model's boxes, and of its clouds. */
  kind: BoxKind;
  columns(width: number): string[];
}

/** Columns as the user declares them (`x,y,z,ring` with `name=value` for those that the file lacks), else the model's. */
export function layoutOf(model: Model | null, declared: string): Layout {
  const named = declared
    .split(",")
    .map((word) => word.trim())
    .filter((word) => word && !word.includes("="));
  const isDepth = model?.modality === "depth" || model?.box_type_3d === "Depth";
  const width = named.length || model?.columns?.length || model?.load_dim || 4;
  return {
    width,
    kind: isDepth ? "Depth" : model?.box_type_3d === "Camera" ? "Camera" : "LiDAR",
    columns: (found) => {
      if (named.length === found) return named;
      return model?.columns?.length === found ? model.columns : usualColumns(found, isDepth);
    },
  };
}

export async function readCloud(file: File, layout: Layout): Promise<Cloud> {
  const buffer = await file.arrayBuffer();
  const head = String.fromCharCode(...new Uint8Array(buffer, 0, Math.min(buffer.byteLength, 8192)));
  const kind = sniff(head);
  const fields = fieldsOf(head);
  try {
    if (kind === "bin") return readBin(buffer, layout);
    if (kind === "npy") return readNpy(buffer, layout.columns);
    if (kind === "pcd") return named(readPcd(buffer, head), fields);
    if (kind === "ply") return named(readPly(buffer, head, spellingOf("intensity", fields)), fields);
  } catch (error) {
    if (kind === "bin") throw error;
  }
  const { columns, values } = await decodePoints(file);
  const width = columns.length;
  const names = columns[0] === "0" ? layout.columns(width) : columns;
  return arrange(values.length / width, names, (row, column) => values[row * width + column]);
}

function sniff(text: string): "npy" | "pcd" | "ply" | "server" | "bin" {
  if (text.startsWith("\x93NUMPY")) return "npy";
  if (/^(# \.PCD|VERSION|FIELDS)/.test(text)) return "pcd";
  if (/^[\s\xef\xbb\xbf#][^]{0,4096}?^FIELDS [^]{0,4096}?^DATA /m.test(text)) return "server";
  if (/^ply[\r\n]/.test(text)) return "ply";
  if (/^(LASF|PK\x03\x04|PK\x05\x06)/.test(text)) return "server";
  return "bin";
}

function readBin(buffer: ArrayBuffer, { width, columns }: Layout): Cloud {
  if (buffer.byteLength % (4 * width)) {
    throw new PageError(
      `${buffer.byteLength} bytes are not points of ${width} float32; name the file's columns under Options of the requests`,
    );
  }
  const values = new Float32Array(buffer);
  return arrange(values.length / width, columns(width), (row, column) => values[row * width + column]);
}

/** Names of the columns in the header of a PCD or a PLY. */
function fieldsOf(head: string): string[] {
  const pcd = /^FIELDS (.*)$/m.exec(head)?.[1].trim().split(/\s+/);
  return pcd ?? [...head.matchAll(/^property \w+ (\w+)\s*$/gm)].map(([, name]) => name);
}

/**
 * A loader that finds no point has not understood the file, and one that finds no intensities or colours although their
 * columns are there does not know their spelling: the server does.
 */
function named(cloud: Cloud, fields: string[]): Cloud {
  const isLacking = !cloud.count || (!cloud.intensity && spellingOf("intensity", fields)) || (!cloud.colours && hasColours(fields));
  if (isLacking) throw new PageError("the page does not read such a cloud");
  return cloud;
}

function hasColours(fields: string[]): boolean {
  return ["rgb", "rgba"].some((name) => fields.includes(name)) || ["red", "green", "blue"].every((name) => spellingOf(name, fields));
}
