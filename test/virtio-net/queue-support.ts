/** A transmit and a receive queue over one pool, with naive devices on the other side. */
import { PacketPool } from '../../src/packet/pool.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';
import {
  decodeNetHeader,
  NetHeader,
  netHeaderLayout,
  receivedGsoTypes,
  sentGsoTypes,
} from '../../src/virtio-net/header.ts';
import { createRxQueue } from '../../src/virtio-net/rx-merge.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { TxQueue } from '../../src/virtio-net/tx.ts';
import { allocateVirtqueue } from '../../src/virtqueue/create.ts';
import { NaiveSplitDevice, setupOf, TestMemory } from '../virtqueue/support.ts';
import '../equality.ts';

export interface Options {
  features?: number[];
  revision?: WireRevision;
  size?: number;
  packets?: number;
  checksum?: boolean;
  maxLength?: number;
  /** Bytes of a slot. */
  stride?: number;
  /** Entries of indirect tables of the transmit queue. */
  indirectEntries?: number;
  /** Pieces of memory of the application. */
  references?: number;
  /** Size of the table of inbound SAs. */
  inbound?: number;
}

export interface Sent {
  readonly head: number;
  readonly header: NetHeader;
  readonly bytes: Uint8Array;
  /** Lengths of the descriptors' pieces. */
  readonly pieces: readonly number[];
}

export function queues(options: Options = {}) {
  const { features = [70, 69], revision = 'virtio-1.4', size = 16, packets = 64, checksum = false } = options;
  const { stride = 2048, indirectEntries = 0 } = options;
  const memory = new TestMemory(0x3_2000_0000);
  const pool = new PacketPool(memory.allocateDma(packets * stride), { stride, references: options.references ?? 0 });
  const negotiated = FeatureSet.of(...features);
  const layout = netHeaderLayout(negotiated, revision);
  const sas = createSaTable(100, options.inbound ?? 50);
  const { iovaLow, iovaHigh } = pool;
  const common = { size, iovaLow, iovaHigh, headroom: layout.length };
  const txRing = allocateVirtqueue('split', memory, { index: 1, ...common, indirectEntries });
  const rxRing = allocateVirtqueue('split', memory, { index: 0, ...common });
  const notified = { tx: 0, rx: 0 };
  const count = (which: 'tx' | 'rx') => ({ notify: () => void notified[which]++ });
  const { maxLength } = options;
  const tx = new TxQueue({
    queue: txRing,
    notifier: count('tx'),
    pool,
    layout,
    sas,
    checksum,
    gsoTypes: sentGsoTypes(negotiated),
    ...(maxLength !== undefined && { maxLength }),
  });
  const rx = createRxQueue({
    queue: rxRing,
    notifier: count('rx'),
    pool,
    layout,
    sas,
    guestChecksum: checksum,
    gsoTypes: receivedGsoTypes(negotiated),
    mergeable: negotiated.has(Feature.MRG_RXBUF),
  });
  const txDevice = new NaiveSplitDevice(memory, setupOf(txRing));
  let rxDevice = new NaiveSplitDevice(memory, setupOf(rxRing));

  /** New packets with this content each, at `shift` bytes behind the usual place. */
  const make = (contents: Uint8Array[], shift = 0): Uint32Array => {
    const numbers = new Uint32Array(contents.length);
    if (pool.allocate(numbers, contents.length) !== contents.length) throw new Error('the pool is empty');
    for (const [i, bytes] of contents.entries()) {
      const at = pool.slot(numbers[i]) + pool.headroom + shift;
      pool.u8.set(bytes, at);
      pool.offset[numbers[i]] = at;
      pool.length[numbers[i]] = bytes.length;
    }
    return numbers;
  };

  /** What the device finds in the transmit ring, completed at once unless `keep`. */
  const sent = (keep = false): Sent[] => {
    const list: Sent[] = [];
    for (let chain = txDevice.fetch(); chain !== undefined; chain = txDevice.fetch()) {
      if (chain.pieces.some(({ writable }) => writable)) throw new Error('a packet is readable');
      const pieces = chain.pieces.map(({ length }) => length);
      const bytes = Uint8Array.from(chain.pieces.flatMap(({ iova, length }) => [...memory.bytes(iova, length)]));
      const header = new NetHeader();
      if (!decodeNetHeader(layout, bytes, 0, bytes.length, header)) throw new Error('no header');
      list.push({ head: chain.head, header, bytes: bytes.subarray(layout.length), pieces });
      if (!keep) txDevice.complete(chain.head, 0);
    }
    return list;
  };

  /** Lets the device put raw bytes, header included, into the next receive buffer. */
  const receive = (bytes: Uint8Array, usedLength = bytes.length): void => {
    const chain = rxDevice.fetch();
    if (chain === undefined) throw new Error('no receive buffer');
    const [piece] = chain.pieces;
    if (chain.pieces.length !== 1 || !piece.writable) throw new Error('a receive buffer is one writable piece');
    memory.bytes(piece.iova, piece.length).set(bytes.subarray(0, piece.length));
    rxDevice.complete(chain.head, usedLength);
  };

  /** The device forgets the receive queue, as in a reset of it. */
  const restartDevice = (): void => {
    rxDevice = new NaiveSplitDevice(memory, setupOf(rxRing));
  };

  return {
    restartDevice,
    memory,
    pool,
    layout,
    sas,
    tx,
    rx,
    txRing,
    rxRing,
    txDevice,
    rxDevice,
    notified,
    make,
    sent,
    receive,
  };
}

/** `n` different bytes. */
export function content(n: number, seed = 1): Uint8Array {
  const bytes = new Uint8Array(n);
  for (let i = 0; i < n; i++) bytes[i] = i * 31 + seed * 17;
  return bytes;
}
