/**
 * A NIC's queues with all that is in front of the rings: bursts of 32 packets of 64 bytes that are received and sent again. One packet
 * forwarded counts once. What plays the device is the loop device of `loop-device.ts`.
 *
 * - `nic.forward.64B`: queue pair in a worker thread (`openQueue`), MAC addresses swapped, the loop device in a thread of its own, which copies
 *   each packet; two cores. `nic.forward.2q`: the rate of two such workers over that of one; each plays its own device, so two cores do.
 * - `nic.forward.line`: what it takes a cache line to go from one of the two cores to the other, on which `forward.64B` depends.
 * - `nic.interrupt.wake`: from the device's interrupt to the code behind `await rx.wait()`, in a worker and in the main thread; `eventfd`: to a thread that was
 *   blocked in read(2), the barest wake-up on this machine; `over_eventfd`: the one over the other, turn about.
 * - `nic.forward_same_thread` and `nic.forward_inline`: driver and loop device in turns in one thread, so what the device costs is included,
 *   and nothing is copied. `forward_inline` has an SA each way on the device, so each packet is counted, held against limits and tagged on the
 *   way out, and counted on the way in. What software SAs cost is measured by `esp.ts`, what MRG_RXBUF costs by `ring.ts`.
 */
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import { SaPlace } from '../../src/ipsec/sa-state.ts';
import { validateSa } from '../../src/ipsec/validate.ts';
import { NicRxQueue } from '../../src/nic/rx-queue.ts';
import { NicTxQueue } from '../../src/nic/tx-queue.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { type DmaMemory, mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { netHeaderLayout } from '../../src/virtio-net/header.ts';
import { RxQueue } from '../../src/virtio-net/rx.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { TxQueue } from '../../src/virtio-net/tx.ts';
import { virtqueueBytes } from '../../src/virtqueue/create.ts';
import { SplitVirtqueue } from '../../src/virtqueue/split.ts';
import { Forwarding, type ForwardingOptions } from '../forwarding.ts';
import {
  type Benchmark,
  type BenchSuite,
  type Measurement,
  rate,
  ratio,
  summarize,
  type Workload,
} from '../harness.ts';
import { lineTimes } from '../line.ts';
import { LoopDevice } from '../loop-device.ts';
import { frame, PACKET_BYTES } from '../shared-pair.ts';
import { blockRatios, type WakingDriver, wakeTimes } from '../waking.ts';

const BURST = 32;
const RING = 256;
const PACKETS = 1024;
/** Bursts per call of `run`. */
const BURSTS = 64;
const IOVA = 0x10000;
const OBJECT = 0x1234;
const HANDLES = 64;
const MTU = 1500;

function memory(size: number, iova: number): DmaMemory {
  return { ...mapAnonymous(size), iova, iovaLow: iova, iovaHigh: 0 };
}

const association = (direction: 'outbound' | 'inbound') =>
  ({
    direction,
    mode: 'tunnel',
    spi: 0x1000,
    aead: { name: 'aes-gcm', key: '000102030405060708090a0b0c0d0e0f', salt: '10111213' },
    tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
  }) as const;

function forward(inline: boolean): Workload {
  const maps: DmaMemory[] = [];
  const allocate = (size: number, iova: number) => {
    const map = memory(size, iova);
    maps.push(map);
    return map;
  };
  const pool = new PacketPool(allocate(PACKETS * 2048, IOVA));
  const layout = netHeaderLayout(FeatureSet.of(Feature.VERSION_1, Feature.IPSEC), 'virtio-1.4');
  const sas = createSaTable(HANDLES + 1, 0x20000);
  const ring = (index: number) => {
    const options = { index, size: RING, iovaLow: IOVA, headroom: layout.length };
    return new SplitVirtqueue(allocate(virtqueueBytes('split', options), 0), options);
  };
  const [rxRing, txRing] = [ring(0), ring(1)];
  const notifier = { notify() {} };
  const manager = new IpsecManager({
    inline: null,
    inlineObstacle: 'no device',
    software: null,
    guard: new NonceGuard({ memory: new NonceMemory() }),
    mtu: MTU,
    handles: HANDLES,
  });
  const rings = { notifier, pool, layout, sas };
  const rxQueue = new RxQueue({ ...rings, queue: rxRing });
  const rx = new NicRxQueue(0, rxQueue, pool, manager);
  const tx = new NicTxQueue(new TxQueue({ ...rings, queue: txRing }), pool, manager);
  const out = inline ? addSas(manager, sas) : 0;
  const device = new LoopDevice(txRing, rxRing, pool.memory, IOVA, {
    length: layout.length,
    flags: inline ? layout.security : 0,
    resourceId: inline ? OBJECT : 0,
    resourceType: inline ? ResourceType.NET_IPSEC_INB_SA : 0,
  });
  rxQueue.refill();
  const burst = new Uint32Array(BURST);
  pool.allocate(burst, BURST);
  for (const p of burst) pool.write(p, frame());
  return {
    operations: BURST * BURSTS * 1e-6,
    run: () => {
      for (let round = 0; round < BURSTS; round++) {
        for (let i = 0; i < BURST; i++) pool.sa[burst[i]] = out;
        const sent = tx.burst(burst, BURST);
        device.run();
        if (rx.burst(burst, BURST) !== sent || sent !== BURST) throw new Error('packets were lost');
      }
    },
    close: () => {
      const last = burst[BURST - 1];
      if (pool.length[last] !== PACKET_BYTES || pool.sa[last] !== (inline ? 2 : 0))
        throw new Error('packets were changed');
      if (inline && manager.state.packets[1] !== manager.state.packets[2]) throw new Error('packets were not counted');
      for (const map of maps) unmapMemory(map);
    },
  };
}

/** Makes an inline SA each way, as the data path knows them; returns the handle to send under. */
function addSas(manager: IpsecManager, table: ReturnType<typeof createSaTable>): number {
  manager.state.add(1, validateSa(association('outbound')), SaPlace.inlineOutbound, MTU, null);
  manager.state.add(2, validateSa(association('inbound')), SaPlace.inlineInbound, 0, null);
  table.resourceId[1] = OBJECT;
  table.handle[OBJECT] = 2;
  return 1;
}

/** Milliseconds until every thread runs compiled code, and of one sample. */
const WARMUP_MS = 1500;
const SAMPLE_MS = 200;
const SAMPLES = 15;

/** A benchmark of threads; `sample` gives its values. */
function threads(
  name: string,
  unit: string,
  options: ForwardingOptions,
  sample: (forwarding: Forwarding) => Promise<number[]>,
  goal?: number,
): Benchmark {
  const measure = async () => {
    const forwarding = new Forwarding(options);
    try {
      await forwarding.ready();
      return summarize(await sample(forwarding), unit);
    } finally {
      await forwarding.close();
    }
  };
  return goal === undefined ? { name, measure } : { name, measure, goal };
}

async function forwardingRates(forwarding: Forwarding): Promise<number[]> {
  forwarding.activate(1);
  await forwarding.wait(WARMUP_MS);
  const rates: number[] = [];
  while (rates.length < SAMPLES) rates.push(await forwarding.rate(SAMPLE_MS));
  return rates;
}

/** Two threads over one, turn about: over the one as often as over the other, because a core may have other work. */
async function scaling(forwarding: Forwarding): Promise<number[]> {
  forwarding.activate(3);
  await forwarding.wait(WARMUP_MS);
  const ratios: number[] = [];
  while (ratios.length < SAMPLES) {
    const rates: number[] = [];
    for (const pairs of [1, 3, 2]) {
      forwarding.activate(pairs);
      await forwarding.wait(SAMPLE_MS / 4);
      rates.push(await forwarding.rate(SAMPLE_MS));
    }
    ratios.push((2 * rates[1]) / (rates[0] + rates[2]));
  }
  return ratios;
}

function waking(name: string, driver: WakingDriver, of: 'driver' | 'reader', goal?: number): Benchmark {
  const measure = async () => summarize((await wakeTimes(driver))[of], 'us');
  return goal === undefined ? { name, measure } : { name, measure, goal };
}

async function wakingOverEventfd(): Promise<Measurement> {
  const { driver, reader } = await wakeTimes('worker');
  return summarize(blockRatios(driver, reader), 'ratio');
}

export const suite: BenchSuite = {
  name: 'nic',
  *benchmarks() {
    yield threads('nic.forward.64B.mpps', 'Mpps', { pairs: 1, device: 'separate' }, forwardingRates, 10);
    yield { name: 'nic.forward.line.ns', measure: async () => summarize(await lineTimes(), 'ns') };
    yield threads('nic.forward.2q.ratio', 'ratio', { pairs: 2, device: 'together' }, scaling, 1.7);
    yield waking('nic.interrupt.wake.us', 'worker', 'driver', 100);
    yield waking('nic.interrupt.wake_main.us', 'main', 'driver', 100);
    yield waking('nic.interrupt.eventfd.us', 'worker', 'reader');
    yield { name: 'nic.interrupt.wake.over_eventfd', measure: wakingOverEventfd };
    yield rate('nic.forward_same_thread.64B.mpps', 'Mpps', () => forward(false));
    yield rate('nic.forward_inline.64B.mpps', 'Mpps', () => forward(true));
    yield ratio(
      'nic.forward_inline.64B.ratio',
      () => forward(true),
      () => forward(false),
    );
  },
};
