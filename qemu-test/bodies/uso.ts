/**
 * Datagrams that are given to the device as one packet (HOST_USO): it cuts them, and each must come back from the echo server by itself, byte
 * for byte. A kernel that serves the echo has found every checksum right.
 */
import { Feature, GsoType, type Nic, NO_PACKET, openNic, PacketFlag } from '../../src/index.ts';
import { completeChecksum, ECHO_PORT, isAnswer, type Peer } from './datagrams.ts';
import { poll } from './frames.ts';
import { hasRightChecksum, leaveChecksum, UDP_PAYLOAD, udpFrame } from './packets.ts';
import type { Place } from './place.ts';

type Ring = 'split' | 'packed';

/** Datagrams of one packet, and the bytes of each; the last one is shorter. */
const DATAGRAMS = 20;
const BYTES = 1000;
const LAST = 333;
const PORT = 11_000;
const BURST = 32;
const TIMEOUT_MS = 20_000;

export const usoName = (ring: Ring): string =>
  `${ring}: one packet of ${DATAGRAMS} datagrams is cut, and each is answered`;

export async function usoBody(place: Place, ring: Ring, peer: Peer): Promise<void> {
  await place.check(usoName(ring), async () => {
    await using nic = await openNic(place.address, { ring, ipsec: 'off' });
    if (!nic.features.has(Feature.HOST_USO)) throw new Error(`negotiated ${nic.features.names().join(' ')}`);
    const payload = Buffer.alloc((DATAGRAMS - 1) * BYTES + LAST);
    for (let i = 0; i < payload.length; i++) payload[i] = (i * 7 + (i >>> 8)) & 0xff;
    for (let i = 0; i < DATAGRAMS; i++) payload[i * BYTES] = i;
    const from = { mac: nic.mac, address: peer.own, port: PORT };
    const length = send(
      nic,
      udpFrame({ from, to: { mac: peer.mac, address: peer.address, port: ECHO_PORT }, payload }),
    );
    await receive(nic, payload);
    return `a packet of ${length} bytes`;
  });
}

/** As a chain of slots; returns its length. */
function send({ packets, queues }: Nic, frame: Buffer): number {
  const { start, offset } = leaveChecksum(frame);
  const each = packets.stride - packets.headroom;
  const slots = new Uint32Array(Math.ceil(frame.length / each));
  if (packets.allocate(slots, slots.length) !== slots.length) throw new Error('too few packets');
  for (const [i, p] of slots.entries()) {
    packets.write(p, frame.subarray(i * each, (i + 1) * each));
    packets.next[p] = slots[i + 1] ?? NO_PACKET;
  }
  const [head] = slots;
  packets.flags[head] = PacketFlag.needsChecksum | PacketFlag.segmented;
  packets.checksumStart[head] = start;
  packets.checksumOffset[head] = offset;
  packets.gsoType[head] = GsoType.UDP_L4;
  packets.gsoSize[head] = BYTES;
  if (queues[0].tx.burst(slots, 1) !== 1) throw new Error('no room in an empty ring');
  return frame.length;
}

async function receive(nic: Nic, payload: Buffer): Promise<void> {
  const { packets, queues } = nic;
  const burst = new Uint32Array(BURST);
  const missing = new Set(Array.from({ length: DATAGRAMS }, (_, i) => i));
  const step = () => {
    if (nic.broken !== null) throw nic.broken;
    const n = queues[0].rx.burst(burst, BURST);
    for (let i = 0; i < n; i++) {
      const frame = packets.read(burst[i]);
      if (!isAnswer(frame)) continue;
      completeChecksum(packets, burst[i], frame);
      const index = frame[UDP_PAYLOAD];
      const wanted = payload.subarray(index * BYTES, (index + 1) * BYTES);
      if (!missing.delete(index)) throw new Error(`datagram ${index} came twice, or was never sent`);
      if (!wanted.equals(frame.subarray(UDP_PAYLOAD))) throw new Error(`datagram ${index} came back changed`);
      if (!hasRightChecksum(frame)) throw new Error(`datagram ${index} has a wrong checksum`);
    }
    packets.free(burst, n);
    return missing.size === 0;
  };
  await poll(step, TIMEOUT_MS, 'the echo of all datagrams');
}
