/**
 * The rings and the virtio-net queues on them: bursts of 32 packets of 64 bytes through `tx.burst`, the loop device,
 * `rx.burst` with its refill, and reclaim; 256 descriptors; everything in one thread. One packet sent and received counts
 * once.
 */
import { PacketPool } from '../../src/packet/pool.ts';
import type { DmaMemory } from '../../src/sys/memory.ts';
import { ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { netHeaderLayout } from '../../src/virtio-net/header.ts';
import { createRxQueue } from '../../src/virtio-net/rx-merge.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { TxQueue } from '../../src/virtio-net/tx.ts';
import { createVirtqueue, type RingFormat, virtqueueBytes } from '../../src/virtqueue/create.ts';
import type { Virtqueue } from '../../src/virtqueue/virtqueue.ts';
import { type BenchSuite, rate, ratio, sampled, type Workload } from '../harness.ts';
import { LoopDevice, PackedLoopDevice } from '../loop-device.ts';

const BURST = 32;
const RING = 256;
const PACKETS = 1024;
const PACKET_BYTES = 64;
/** Bursts per call of `run`. */
const BURSTS = 64;
const IOVA = 0x10000;
const SA_HANDLE = 5;
const SA_OBJECT = 0x1234;

function memory(size: number, iova: number): DmaMemory {
  const bytes = new ArrayBuffer(Math.ceil(size / 4096) * 4096);
  return {
    address: 0,
    size: bytes.byteLength,
    u8: new Uint8Array(bytes),
    u16: new Uint16Array(bytes),
    u32: new Uint32Array(bytes),
    iova,
    iovaLow: iova,
    iovaHigh: 0,
  };
}

function makeQueue(format: RingFormat, index: number, headroom: number): Virtqueue {
  const options = { index, size: RING, iovaLow: IOVA, headroom };
  return createVirtqueue(format, memory(virtqueueBytes(format, options), 0), options);
}

interface Loop {
  round(): void;
  check(): void;
}

/** A driver and a loop device; `secured` tags every packet with an SA, out and in. */
function loop(format: RingFormat, secured: boolean, features: FeatureSet): Loop {
  const pool = new PacketPool(memory(PACKETS * 2048, IOVA));
  const layout = netHeaderLayout(features, 'virtio-1.4');
  const sas = createSaTable(64, 0x20000);
  sas.resourceId[SA_HANDLE] = SA_OBJECT;
  sas.handle[SA_OBJECT] = SA_HANDLE;
  const notifier = { notify() {} };
  const txRing = makeQueue(format, 1, layout.length);
  const rxRing = makeQueue(format, 0, layout.length);
  const tx = new TxQueue({ queue: txRing, notifier, pool, layout, sas });
  const mergeable = features.has(Feature.MRG_RXBUF);
  const rx = createRxQueue({ queue: rxRing, notifier, pool, layout, sas, mergeable });
  rx.refill();
  const header = {
    length: layout.length,
    flags: secured ? layout.security : 0,
    resourceId: secured ? SA_OBJECT : 0,
    resourceType: secured ? ResourceType.NET_IPSEC_INB_SA : 0,
  };
  const Device = format === 'packed' ? PackedLoopDevice : LoopDevice;
  const device = new Device(txRing, rxRing, pool.memory, IOVA, header);
  const burst = new Uint32Array(BURST);
  const handle = secured ? SA_HANDLE : 0;
  pool.allocate(burst, BURST);
  for (const p of burst) {
    pool.length[p] = PACKET_BYTES;
    pool.sa[p] = handle;
  }
  let rounds = 0;
  return {
    round() {
      // hot: what was received is sent again; its SA is the one that it came with.
      tx.burst(burst, BURST);
      device.run();
      rx.burst(burst, BURST);
      rounds++;
    },
    check() {
      const packets = tx.counters[0];
      if (packets !== rounds * BURST || rx.counters[0] !== packets) throw new Error('packets were lost');
      const last = burst[BURST - 1];
      if (pool.length[last] !== PACKET_BYTES || pool.sa[last] !== handle) throw new Error('packets were changed');
    },
  };
}

function loopWorkload(format: RingFormat, secured: boolean, features: FeatureSet): Workload {
  const { round, check } = loop(format, secured, features);
  return {
    operations: BURST * BURSTS * 1e-6,
    run: () => {
      for (let i = 0; i < BURSTS; i++) round();
    },
    close: check,
  };
}

/** The loop device alone, on rings that are always full of the same buffers. */
function deviceWorkload(): Workload {
  const packets = memory(PACKETS * 2048, IOVA);
  const rings = [makeQueue('split', 1, 0), makeQueue('split', 0, 0)];
  const lengths = new Uint32Array(RING).fill(PACKET_BYTES);
  const offsets = Uint32Array.from({ length: RING }, (_, i) => i * 2048);
  const tokens = Uint32Array.from({ length: RING }, (_, i) => i);
  for (const ring of rings) {
    ring.postBurst(tokens, 0, RING, offsets, lengths, false);
    ring.publish();
  }
  const header = { length: 32, flags: 0, resourceId: 0, resourceType: 0 };
  const device = new LoopDevice(rings[0], rings[1], packets, IOVA, header);
  const avail = rings.map((ring) => (ring.driverArea >>> 1) + 1);
  device.run();
  let idx = RING;
  return {
    operations: BURST * BURSTS * 1e-6,
    run: () => {
      for (let i = 0; i < BURSTS; i++) {
        idx = (idx + BURST) & 0xffff;
        rings[0].memory.u16[avail[0]] = idx;
        rings[1].memory.u16[avail[1]] = idx;
        if (device.run() !== BURST) throw new Error('the loop device lost count');
      }
    },
  };
}

/** Bytes by which the heap grows per million packets: what is not returned by a collection, and garbage made meanwhile. */
function heapGrowth(format: RingFormat): number {
  const { round } = loop(format, true, IPSEC);
  const million = Math.round(1e6 / BURST);
  for (let i = 0; i < million; i++) round();
  globalThis.gc?.();
  const before = process.memoryUsage().heapUsed;
  for (let i = 0; i < 4 * million; i++) round();
  return (process.memoryUsage().heapUsed - before) / 4;
}

/** What tagging, and looking for packets over several buffers, may leave of the plain rate. */
const LITTLE_LESS = 0.85;
/** What packed rings are to reach of the rate of split ones. */
const PACKED_OVER_SPLIT = 0.9;
const PLAIN = FeatureSet.of(Feature.VERSION_1);
const IPSEC = FeatureSet.of(Feature.VERSION_1, Feature.IPSEC, Feature.OUT_NET_HEADER);

export const suite: BenchSuite = {
  name: 'ring',
  *benchmarks() {
    for (const format of ['split', 'packed'] as const) {
      yield rate(`ring.${format}.tx_rx.mpps`, 'Mpps', () => loopWorkload(format, false, IPSEC));
      yield rate(`ring.${format}.tx_rx_security.mpps`, 'Mpps', () => loopWorkload(format, true, IPSEC));
      const security = ratio(
        `ring.${format}.tx_rx_security.ratio`,
        () => loopWorkload(format, true, IPSEC),
        () => loopWorkload(format, false, IPSEC),
      );
      yield { ...security, goal: LITTLE_LESS };
      const mergeable = ratio(
        `ring.${format}.tx_rx_mergeable.ratio`,
        () => loopWorkload(format, false, IPSEC.with(Feature.MRG_RXBUF)),
        () => loopWorkload(format, false, IPSEC),
      );
      yield { ...mergeable, goal: LITTLE_LESS };
      yield rate(`ring.${format}.tx_rx_plain_header.mpps`, 'Mpps', () => loopWorkload(format, false, PLAIN));
      yield sampled(`ring.${format}.heap_growth.bytes_per_million`, 'B', 5, () => heapGrowth(format));
    }
    yield rate('ring.split.loop_device.mpps', 'Mpps', deviceWorkload);
    // In turns in one process, where the queues' callers have seen both formats.
    const packed = ratio(
      'ring.packed_to_split.ratio',
      () => loopWorkload('packed', false, IPSEC),
      () => loopWorkload('split', false, IPSEC),
    );
    yield { ...packed, goal: PACKED_OVER_SPLIT };
  },
};
