/**
 * What the driver sides of split and packed virtqueues share: what was handed out to the device, remembered in private arrays that
 * the device cannot change, and how a queue ends.
 *
 * `split.ts` and `packed.ts` hold the bursts of an *ordered* queue, `split-descriptors.ts` and `packed-descriptors.ts` all that is
 * less common: chains, buffers that come back in another order, batches of IN_ORDER.
 */
import { VirtioError } from '../errors.ts';
import type { DmaMemory } from '../sys/memory.ts';
import { chainCapacity, DESCRIPTOR_BYTES, DESCRIPTOR_WORDS, DescriptorFlag, writePiece } from './descriptor.ts';
import { STOPPED, type VirtqueueOptions } from './virtqueue.ts';

/** Byte offsets of the parts of a queue; the descriptors are at 0. */
export interface QueueLayout {
  readonly driver: number;
  readonly device: number;
  readonly indirect: number;
  readonly bytes: number;
}

export abstract class DriverQueue {
  readonly index: number;
  readonly size: number;
  readonly memory: DmaMemory;
  /** IOVAs of the three parts; what they are called depends on the format. */
  readonly descriptorArea: number;
  readonly driverArea: number;
  readonly deviceArea: number;

  protected readonly eventIdx: boolean;
  protected readonly inOrder: boolean;
  protected readonly iovaLow: number;
  protected readonly iovaHigh: number;
  protected readonly headroom: number;
  protected readonly u16: Uint16Array;
  protected readonly u32: Uint32Array;
  readonly #indirectEntries: number;
  /** Byte offset in `memory` of the indirect tables. */
  readonly #indirect: number;
  readonly #bytes: number;

  /** Buffers come back in the order in which they were given, and are single descriptors: see `split.ts` and `packed.ts`. */
  protected ordered = true;
  // By id, for buffers that are out: bytes that the device may write, plus 1; the token; the number of descriptors less 1.
  // Unless ordered, capacity 0 says that the id is not out.
  protected readonly capacity: Uint32Array;
  protected readonly token: Uint32Array;
  protected readonly chain: Uint16Array;
  /** Stack of free ids, unless ordered. */
  protected readonly freeIds: Uint16Array;
  /** Free descriptors. */
  protected unused: number;
  /** Buffers that are out and have more than one descriptor. */
  protected chained = 0;
  /** What was published and has not come back: buffers of a split queue, descriptors of a packed one. */
  protected outstanding = 0;
  /** Buffers that the device has returned by naming the last of them, and that were not taken; what it wrote into that one. */
  protected batch = 0;
  protected batchBytes = 0;
  /** Why every call does nothing, or null. */
  protected closed: VirtioError | null = null;

  constructor(memory: DmaMemory, options: VirtqueueOptions, layout: QueueLayout) {
    const { index, size } = options;
    if (memory.size < layout.bytes) {
      throw new RangeError(`queue ${index}: ${memory.size} bytes of memory, needs ${layout.bytes}`);
    }
    this.index = index;
    this.size = size;
    this.memory = memory;
    this.descriptorArea = memory.iova;
    this.driverArea = memory.iova + layout.driver;
    this.deviceArea = memory.iova + layout.device;
    this.eventIdx = options.eventIdx ?? false;
    this.inOrder = options.inOrder ?? false;
    this.iovaLow = options.iovaLow ?? 0;
    this.iovaHigh = options.iovaHigh ?? 0;
    this.headroom = options.headroom ?? 0;
    this.u16 = memory.u16;
    this.u32 = memory.u32;
    this.#indirectEntries = options.indirectEntries ?? 0;
    this.#indirect = layout.indirect;
    this.#bytes = layout.bytes;
    this.capacity = new Uint32Array(size);
    this.token = new Uint32Array(size);
    this.chain = new Uint16Array(size);
    this.freeIds = new Uint16Array(size);
    this.unused = size;
  }

  get free(): number {
    return this.closed === null ? this.unused : 0;
  }

  get out(): number {
    return this.closed === null ? this.size - this.unused : 0;
  }

  get broken(): VirtioError | null {
    return this.closed === STOPPED ? null : this.closed;
  }

  fail(reason: VirtioError): void {
    if (this.closed === null || this.closed === STOPPED) this.closed = reason;
  }

  stop(): void {
    this.closed ??= STOPPED;
  }

  /** The device broke a rule. */
  protected refuse(code: string, message: string): void {
    this.fail(new VirtioError(code, `queue ${this.index}: ${message}`));
  }

  protected refuseId(id: number): void {
    this.refuse('USED_ID', `used id ${id} was not given out`);
  }

  protected refuseLength(id: number, bytes: number): void {
    const writable = this.capacity[id] - 1;
    this.refuse('USED_LENGTH', `used length ${bytes} for a buffer of ${writable} writable bytes`);
  }

  postChain(token: number, pieces: Uint32Array, readable: number, writable: number): boolean {
    const count = readable + writable;
    if (this.closed !== null || count === 0) return false;
    const capacity = chainCapacity(this.size, pieces, readable, writable);
    const indirect = count > 1 && count <= this.#indirectEntries;
    const descriptors = indirect ? 1 : count;
    if (descriptors > this.unused) return false;
    const id = this.chainId();
    this.token[id] = token;
    this.capacity[id] = capacity + 1;
    this.chain[id] = descriptors - 1;
    if (descriptors > 1) this.chained++;
    if (indirect) this.writeList(id, this.#writeTable(id, pieces, readable, count), 1, 1, DescriptorFlag.INDIRECT);
    else this.writeList(id, pieces, readable, count, 0);
    return true;
  }

  /** Writes the indirect table of buffer `id`, and returns the piece that describes it. */
  #writeTable(id: number, pieces: Uint32Array, readable: number, count: number): Uint32Array {
    const table = this.#indirect + id * this.#indirectEntries * DESCRIPTOR_BYTES;
    for (let i = 0; i < count; i++) {
      const last = this.tableWord(i < readable ? 0 : DescriptorFlag.WRITE, i + 1 < count ? i + 1 : 0);
      writePiece(this.u32, (table >>> 2) + i * DESCRIPTOR_WORDS, pieces, i, last);
    }
    const { iovaLow, iovaHigh } = this.memory;
    return Uint32Array.of(iovaLow + table, iovaHigh, count * DESCRIPTOR_BYTES);
  }

  /** The id for a chain that is going to be posted. */
  protected abstract chainId(): number;
  /**
   * Writes a buffer of `count` descriptors for `pieces`, of which the first `readable` are, and each has `flags` too. There is room
   * for them.
   */
  protected abstract writeList(id: number, pieces: Uint32Array, readable: number, count: number, flags: number): void;
  /** The fourth word of an entry of an indirect table with these flags; `next` is that of the entry that follows, or 0. */
  protected abstract tableWord(flags: number, next: number): number;
  /** From ids that are positions to ids from a stack. */
  protected abstract endOrder(): void;
  /** Everything that a format has besides, as new; interrupts are off then. The memory is zero. */
  protected abstract begin(): void;

  reclaimAll(tokens: Uint32Array): number {
    this.fail(new VirtioError('QUEUE_CLOSED', `queue ${this.index} was reset`));
    this.endOrder();
    let n = 0;
    for (let id = 0; id < this.size; id++) {
      if (this.capacity[id] === 0) continue;
      tokens[n++] = this.token[id];
      this.capacity[id] = 0;
    }
    this.outstanding = 0;
    return n;
  }

  restart(): void {
    this.ordered = true;
    this.chain.fill(0);
    this.unused = this.size;
    this.chained = 0;
    this.outstanding = 0;
    this.batch = 0;
    this.closed = null;
    this.memory.u8.fill(0, 0, this.#bytes);
    this.begin();
  }
}
