/**
 * Gives out ranges of numbers, first fit: I/O virtual addresses, offsets in a file. Numbers are below 2^53.
 */

interface Range {
  start: number;
  /** Inclusive, so that a range may end at the top of its space. */
  last: number;
}

export class RangeAllocator {
  /** Free ranges, ascending, never adjacent nor overlapping. */
  readonly #free: Range[];
  /** Size by start of what is out, so that nothing is given back that was not taken. */
  readonly #taken = new Map<number, number>();
  readonly #boundary: number;

  /** No range that is given out crosses a multiple of `boundary`. `ranges` may come in any order and overlap. */
  constructor(ranges: readonly { readonly start: number; readonly last: number }[], boundary: number) {
    this.#boundary = boundary;
    this.#free = [];
    for (const { start, last } of ranges) {
      if (!Number.isSafeInteger(start) || !Number.isSafeInteger(last) || start < 0 || last < start) {
        throw new RangeError(`${start} to ${last} is not a range`);
      }
    }
    for (const { start, last } of [...ranges].sort((a, b) => a.start - b.start)) {
      const before = this.#free.at(-1);
      if (before !== undefined && start <= before.last + 1) before.last = Math.max(before.last, last);
      else this.#free.push({ start, last });
    }
  }

  /** Start of the lowest free range of `size` at a multiple of `alignment`; -1 when there is none. */
  allocate(size: number, alignment: number): number {
    if (!Number.isSafeInteger(size) || size <= 0 || size > this.#boundary) return -1;
    for (let i = 0; i < this.#free.length; i++) {
      const range = this.#free[i];
      const start = this.#place(range.start, size, alignment);
      if (start + size - 1 > range.last) continue;
      const rest: Range[] = [];
      if (start > range.start) rest.push({ start: range.start, last: start - 1 });
      if (start + size - 1 < range.last) rest.push({ start: start + size, last: range.last });
      this.#free.splice(i, 1, ...rest);
      this.#taken.set(start, size);
      return start;
    }
    return -1;
  }

  /** Gives back what `allocate` returned. Throws RangeError on anything else. */
  free(start: number, size: number): void {
    if (this.#taken.get(start) !== size) throw new RangeError(`${size} at ${start} is not taken`);
    this.#taken.delete(start);
    const last = start + size - 1;
    let at = this.#free.findIndex((range) => range.start > start);
    if (at < 0) at = this.#free.length;
    const before = this.#free[at - 1];
    const after = this.#free[at];
    const joinsBefore = before !== undefined && before.last + 1 === start;
    const joinsAfter = after !== undefined && last + 1 === after.start;
    if (joinsBefore && joinsAfter) {
      before.last = after.last;
      this.#free.splice(at, 1);
    } else if (joinsBefore) before.last = last;
    else if (joinsAfter) after.start = start;
    else this.#free.splice(at, 0, { start, last });
  }

  /** First multiple of `alignment` from `from` on where `size` does not cross a boundary. */
  #place(from: number, size: number, alignment: number): number {
    const start = Math.ceil(from / alignment) * alignment;
    const boundary = (Math.floor(start / this.#boundary) + 1) * this.#boundary;
    if (start + size <= boundary) return start;
    return Math.ceil(boundary / alignment) * alignment;
  }
}
