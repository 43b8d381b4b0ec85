/**
 * A bulk TCP stream from one function of the software device to the other: payload in pieces of 45 x 1448 bytes, each sent as one packet that is
 * to be segmented (TSO), or as 45 packets. Everything else is the same: both drivers have negotiated all that there is for checksums and
 * segmentation, both leave checksums open as a TCP stack does, packets are freed where they arrive. What an application does to its payload and
 * headers is not there, which is to the advantage of small packets. Slots, and with them receive buffers, have the size that suits: 2 KiB for
 * small packets, which are slower in larger ones, and 16 KiB for large packets, which take five of them then.
 */
import { Arena } from '../src/device/arena.ts';
import { makeFunction, makePool, maxFrameOf } from '../src/device/assemble.ts';
import { NO_FAULTS } from '../src/device/faults.ts';
import { pairLink } from '../src/device/links/pair.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4, Tcp } from '../src/packet/fields.ts';
import { NO_PACKET, PacketFlag, PacketPool } from '../src/packet/pool.ts';
import { Feature, FeatureSet } from '../src/virtio/features.ts';
import { GsoType, netHeaderLayout, receivedGsoTypes, sentGsoTypes } from '../src/virtio-net/header.ts';
import { createRxQueue } from '../src/virtio-net/rx-merge.ts';
import { createSaTable } from '../src/virtio-net/sa-table.ts';
import { MAX_CHAIN, TxQueue } from '../src/virtio-net/tx.ts';
import { virtqueueBytes } from '../src/virtqueue/create.ts';
import { SplitVirtqueue } from '../src/virtqueue/split.ts';
import { Guest, initialize } from './device-guest.ts';
import type { Workload } from './harness.ts';

const REVISION = 'virtio-1.4';
const RING = 256;
const PACKETS = 1024;
const MTU = 1500;
/** TCP with time stamps. */
const TCP_HEADER = Tcp.minLength + 12;
const HEADERS = Ethernet.length + Ipv4.minLength + TCP_HEADER;
const MSS = MTU - Ipv4.minLength - TCP_HEADER;
const SEGMENTS = 45;
const PAYLOAD = SEGMENTS * MSS;
/** Pieces per call of `run`. */
const PIECES = 8;
const F = Feature;
const FEATURES = FeatureSet.of(
  ...[F.VERSION_1, F.INDIRECT_DESC, F.CSUM, F.GUEST_CSUM, F.MRG_RXBUF, F.HOST_TSO4, F.GUEST_TSO4, F.GUEST_HDRLEN],
);

/** Headers of a TCP packet with `payload` bytes. */
function headers(payload: number): Uint8Array {
  const bytes = new Uint8Array(HEADERS);
  const length = HEADERS - Ethernet.length + payload;
  bytes[Ethernet.type] = EtherType.ipv4 >>> 8;
  bytes.set([0x45, 0, length >>> 8, length, 0, 0, 0x40, 0, 64, IpProtocol.tcp], Ethernet.length);
  bytes.set([10, 0, 0, 1, 10, 0, 0, 2], Ethernet.length + Ipv4.source);
  bytes[Ethernet.length + Ipv4.minLength + Tcp.dataOffset] = (TCP_HEADER / 4) << 4;
  return bytes;
}

/** Two functions, with a driver each. */
function makeStream(slot: number) {
  const arena = new Arena();
  const pool = makePool(arena, 4096, maxFrameOf(MTU));
  const links = pairLink(pool);
  const [left, right] = links.map((link) => {
    const { fn, device } = makeFunction({
      ...{ arena, pool, link, queuePairs: 1, wire: REVISION, ipsec: false },
      ...{ mac: Uint8Array.of(2, 0, 0, 0, 0, 1), mtu: MTU, faults: NO_FAULTS, wake: () => {} },
    });
    const guest = new Guest(fn);
    const layout = netHeaderLayout(FEATURES, REVISION);
    const packets = new PacketPool(guest.allocate(PACKETS * slot), { stride: slot });
    const ring = (index: number) => {
      const { iovaLow, iovaHigh } = packets;
      const indirectEntries = index === 1 ? MAX_CHAIN : 0;
      const options = { index, size: RING, iovaLow, iovaHigh, headroom: layout.length, indirectEntries };
      return new SplitVirtqueue(guest.allocate(virtqueueBytes('split', options)), options);
    };
    const rings = [ring(0), ring(1)];
    initialize(fn, FEATURES, rings);
    const common = { notifier: { notify() {} }, pool: packets, layout, sas: createSaTable(1, 1) };
    const receiving = { guestChecksum: true, mergeable: true, gsoTypes: receivedGsoTypes(FEATURES) };
    const sending = { checksum: true, gsoTypes: sentGsoTypes(FEATURES), maxLength: MTU + Ethernet.length };
    const rx = createRxQueue({ ...common, ...receiving, queue: rings[0] });
    const tx = new TxQueue({ ...common, ...sending, queue: rings[1] });
    rx.refill();
    return { fn, device, guest, packets, rx, tx };
  });
  const close = () => {
    for (const { fn, device, guest } of [left, right]) {
      guest.close();
      fn.close();
      device.close();
    }
    arena.close();
  };
  return { left, right, close };
}

/** Bytes of a slot: for small packets, and for large ones. */
export const Slot = { small: 2048, large: 16384 } as const;

/** The stream, with segmentation left to the device or not, over slots of `slot` bytes; gigabits are of payload. */
export function tcpStream(tso: boolean, slot: number): Workload {
  const { left, right, close } = makeStream(slot);
  const { packets } = left;
  const room = slot - packets.headroom;
  const bytes = HEADERS + PAYLOAD;
  const count = tso ? Math.ceil(bytes / room) : SEGMENTS;
  const burst = new Uint32Array(count);
  const out = new Uint32Array(64);
  const header = headers(tso ? PAYLOAD : MSS);
  const every = new Uint32Array(PACKETS);
  const free = packets.allocate(every, PACKETS);
  for (const p of every.subarray(0, free)) packets.write(p, header);
  packets.free(every, free);

  const markChecksum = (p: number, flags: number) => {
    packets.flags[p] = flags;
    packets.checksumStart[p] = HEADERS - TCP_HEADER;
    packets.checksumOffset[p] = Tcp.checksum;
  };
  const fill = (): number => {
    // hot:
    left.tx.reclaim();
    if (packets.allocate(burst, count) !== count) throw new Error('the pool is empty');
    if (!tso) {
      for (let i = 0; i < count; i++) {
        packets.length[burst[i]] = HEADERS + MSS;
        markChecksum(burst[i], PacketFlag.needsChecksum);
      }
      return count;
    }
    for (let i = 0; i < count; i++) {
      packets.length[burst[i]] = i + 1 < count ? room : bytes - (count - 1) * room;
      packets.next[burst[i]] = i + 1 < count ? burst[i + 1] : NO_PACKET;
    }
    markChecksum(burst[0], PacketFlag.needsChecksum | PacketFlag.segmented);
    packets.gsoType[burst[0]] = GsoType.TCPV4;
    packets.gsoSize[burst[0]] = MSS;
    return 1;
  };
  const piece = () => {
    // hot:
    const n = fill();
    if (left.tx.burst(burst, n) !== n) throw new Error('the transmit queue is full');
    left.device.poll();
    let got = 0;
    for (let i = 0; got < n && i < 4; i++) {
      right.device.poll();
      const now = right.rx.burst(out, out.length);
      got += now;
      right.packets.freeChains(out, now);
    }
    if (got !== n) throw new Error(`${got} packets came: ${JSON.stringify(right.device.statistics())}`);
  };
  return {
    operations: PIECES * PAYLOAD * 8e-9,
    run: () => {
      for (let i = 0; i < PIECES; i++) piece();
    },
    close: () => {
      const { rxBytes, rxPackets } = right.device.statistics();
      if (rxBytes !== Number(rxPackets) * (HEADERS + (tso ? PAYLOAD : MSS))) throw new Error('bytes were lost');
      close();
    },
  };
}
