/**
 * Ids of resource objects of one type: 0 to limit - 1 (Virtio 1.4, 2.12.1.4 "Device resource objects").
 *
 * An id that was given back is used again as late as possible, because packets that name it may still be on their way: first all ids
 * that were never used, then the one that has been free for longest.
 */
export class ObjectIds {
  readonly limit: number;
  #fresh = 0;
  /** Freed ids, oldest first from `#head` on. */
  #freed: number[] = [];
  #head = 0;
  /** By id: 1 while it is in use. Grows with the ids that were handed out. */
  #taken = new Uint8Array(16);
  #used = 0;

  constructor(limit: number) {
    this.limit = limit;
  }

  /** Ids in use. */
  get used(): number {
    return this.#used;
  }

  /** An id, and whether an earlier object had it; null when all are in use. */
  take(): { readonly id: number; readonly reused: boolean } | null {
    if (this.#fresh < this.limit) {
      const id = this.#fresh++;
      if (id >= this.#taken.length) {
        const larger = new Uint8Array(2 * this.#taken.length);
        larger.set(this.#taken);
        this.#taken = larger;
      }
      return this.#mark(id, false);
    }
    if (this.#head === this.#freed.length) return null;
    const id = this.#freed[this.#head++];
    if (this.#head > 1024 && this.#head * 2 > this.#freed.length) {
      this.#freed = this.#freed.slice(this.#head);
      this.#head = 0;
    }
    return this.#mark(id, true);
  }

  #mark(id: number, reused: boolean): { readonly id: number; readonly reused: boolean } {
    this.#taken[id] = 1;
    this.#used++;
    return { id, reused };
  }

  /** Gives `id` back; false when it was not in use. */
  give(id: number): boolean {
    if (this.#taken[id] !== 1) return false;
    this.#taken[id] = 0;
    this.#used--;
    this.#freed.push(id);
    return true;
  }
}
