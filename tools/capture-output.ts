/**
 * A capture file that appears whole or not at all: it is written beside its place and renamed at the end. A place that is
 * no ordinary file (a pipe, /dev/stdout) is written directly.
 */
import { renameSync, rmSync, statSync } from 'node:fs';
import { InputError } from '../src/errors.ts';
import { CaptureWriter, type CaptureWriterOptions } from '../src/packet/capture-file.ts';

export class CaptureOutput {
  /** It is written where it is to be: nothing would be left over. */
  readonly isDirect: boolean;
  readonly #path: string;
  readonly #written: string;
  #writer: CaptureWriter | undefined;
  #committed = false;

  /** Refuses to write over `input`. */
  constructor(path: string, input?: string) {
    const existing = statSync(path, { throwIfNoEntry: false });
    if (existing !== undefined && input !== undefined) {
      const source = statSync(input);
      if (existing.isFile() && existing.dev === source.dev && existing.ino === source.ino) {
        throw new InputError('SAME_FILE', `${path} is the input`, { hint: 'give --out another name' });
      }
    }
    this.#path = path;
    this.isDirect = existing !== undefined && !existing.isFile();
    this.#written = this.isDirect ? path : `${path}.${process.pid}.part`;
  }

  /** The writer; the options count the first time. */
  open(options: CaptureWriterOptions): CaptureWriter {
    if (this.#writer !== undefined) return this.#writer;
    try {
      this.#writer = new CaptureWriter(this.#written, { ...options, exclusive: !this.isDirect });
    } catch (error) {
      const what = error instanceof Error ? error.message : 'unknown error';
      throw new InputError('OUTPUT_UNWRITABLE', `cannot write ${this.#path}: ${what}`, { cause: error });
    }
    return this.#writer;
  }

  /** Puts the finished file in its place. */
  commit(): void {
    this.#writer?.close();
    if (!this.isDirect) renameSync(this.#written, this.#path);
    this.#committed = true;
  }

  /** Removes what was written unless it was committed. */
  [Symbol.dispose](): void {
    if (this.#committed) return;
    try {
      this.#writer?.close();
    } finally {
      if (!this.isDirect) rmSync(this.#written, { force: true });
    }
  }
}
