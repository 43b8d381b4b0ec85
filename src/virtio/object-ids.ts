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
  readonly #used = new Set<number>();

  constructor(limit: number) {
    this.limit = limit;
  }

  /** Ids in use. */
  get used(): number {
    return this.#used.size;
  }

  /** An id, and whether an earlier object had it; null when all are in use. */
  take(): { readonly id: number; readonly reused: boolean } | null {
    if (this.#fresh < this.limit) {
      const id = this.#fresh++;
      this.#used.add(id);
      return { id, reused: false };
    }
    if (this.#head === this.#freed.length) return null;
    const id = this.#freed[this.#head++];
    if (this.#head > 1024 && this.#head * 2 > this.#freed.length) {
      this.#freed = this.#freed.slice(this.#head);
      this.#head = 0;
    }
    this.#used.add(id);
    return { id, reused: true };
  }

  /** Gives `id` back; false when it was not in use. */
  give(id: number): boolean {
    if (!this.#used.delete(id)) return false;
    this.#freed.push(id);
    return true;
  }
}
