/**
 * A queue pair in shared memory (a memfd) for the threads of a benchmark: what the driver's thread opens with `openQueue`, and the loop device at the
 * other end of its rings. No NIC has it, and nobody but these threads.
 */
import { MessageChannel } from 'node:worker_threads';
import { countsBuffer } from '../src/ipsec/sa-state.ts';
import { layoutOf, virtqueueOptions } from '../src/nic/pair.ts';
import { EventFd } from '../src/sys/eventfd.ts';
import { close, ftruncate, memfdCreate } from '../src/sys/libc.ts';
import { MappingLedger } from '../src/sys/mapping-ledger.ts';
import { mapShared } from '../src/sys/memory.ts';
import { Feature, FeatureSet } from '../src/virtio/features.ts';
import { virtqueueBytes } from '../src/virtqueue/create.ts';
import { splitLayout } from '../src/virtqueue/split-layout.ts';
import { ControlBlock } from '../src/worker/control-block.ts';
import type { QueueHandle, RingHandle } from '../src/worker/handle.ts';
import { LoopDevice, type LoopRing } from './loop-device.ts';

const RING = 256;
const PACKETS = 1024;
const STRIDE = 2048;
const HEADROOM = 128;
const PAGE = 4096;
const HANDLES = 64;
/** Addresses of the device: any. */
const IOVA = 0x1000_0000;
/** Bytes of the packets of these benchmarks. */
export const PACKET_BYTES = 64;

/** What the device's side needs to know; can be posted as it is. */
export interface PairRings extends Omit<QueueHandle, 'port'> {
  /** Bytes of a packet header. */
  readonly header: number;
}

export interface SharedPair {
  readonly handle: QueueHandle;
  readonly rings: PairRings;
  readonly control: ControlBlock;
  /** Closes the descriptors; after the end of the threads. */
  close(): void;
}

export function makePair(index: number): SharedPair {
  const settings = {
    features: FeatureSet.of(Feature.VERSION_1, Feature.IPSEC),
    wire: 'virtio-1.4',
    mtu: 1500,
  } as const;
  const pool = { offset: 0, size: PACKETS * STRIDE, iova: IOVA };
  const memory = memfdCreate('vipsec-bench');
  const interrupt = EventFd.create();
  const kick = EventFd.create();
  let offset = pool.size;
  const ring = (which: 0 | 1): RingHandle => {
    const options = virtqueueOptions(settings, 2 * index + which, RING, { iovaLow: IOVA, iovaHigh: 0 });
    const size = Math.ceil(virtqueueBytes('split', options) / PAGE) * PAGE;
    const at = { fd: memory, offset, size, iova: IOVA + offset };
    offset += size;
    return { options, memory: at, doorbell: { relay: kick.fd } };
  };
  const [rx, tx] = [ring(0), ring(1)];
  ftruncate(memory, offset);
  const control = new ControlBlock();
  const { port1, port2: port } = new MessageChannel();
  port1.unref();
  const given: Omit<QueueHandle, 'port'> = {
    index,
    address: 'bench',
    features: [...settings.features.words],
    wire: settings.wire,
    mtu: settings.mtu,
    mac: new Uint8Array(6),
    rx,
    tx,
    pool: { memory: { fd: memory, ...pool }, stride: STRIDE, headroom: HEADROOM, references: 0 },
    interrupt: interrupt.fd,
    control: control.buffer,
    ledger: new MappingLedger().buffer,
    sas: {
      handles: HANDLES,
      inboundLimit: HANDLES,
      owners: new SharedArrayBuffer(2 * (HANDLES + 1)),
      counts: countsBuffer(HANDLES),
      engine: null,
    },
  };
  return {
    handle: { ...given, port },
    rings: { ...given, header: layoutOf(settings).length },
    control,
    close() {
      port1.close();
      for (const fd of [memory, interrupt.fd, kick.fd]) close(fd);
    },
  };
}

/** An end of a ring for who plays the device. */
export function loopRing({ memory, options }: RingHandle): LoopRing {
  const { fd, offset, size, iova } = memory;
  const layout = splitLayout(options);
  const [iovaLow, iovaHigh] = [iova, 0];
  return {
    size: options.size,
    descriptorArea: iova,
    driverArea: iova + layout.driver,
    deviceArea: iova + layout.device,
    memory: { ...mapShared(fd, offset, size, { write: true, populate: true }), iova, iovaLow, iovaHigh },
  };
}

/** A device that copies packets and wants no notifications. Only when the driver has opened its queue, which clears the rings. */
export function loopDevice({ pool, header, rx, tx }: PairRings): LoopDevice {
  const { fd, offset, size, iova } = pool.memory;
  const packets = mapShared(fd, offset, size, { write: true, populate: true });
  const said = { length: header, flags: 0, resourceId: 0, resourceType: 0 };
  const device = new LoopDevice(loopRing(tx), loopRing(rx), packets, iova, said, PACKET_BYTES);
  device.suppressNotifications();
  return device;
}

/** An Ethernet frame with an IPv4 UDP packet. */
export function frame(): Uint8Array {
  const bytes = new Uint8Array(PACKET_BYTES);
  bytes.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0, 0, PACKET_BYTES - 14, 0, 1, 0, 0, 64, 17]);
  bytes.set([0x66, 0xb9, 10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 9, 0, PACKET_BYTES - 34], 24);
  return bytes;
}
