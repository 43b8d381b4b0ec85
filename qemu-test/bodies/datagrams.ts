/**
 * The datagrams of `flows.ts`: what is sent to an echo server, and what must come back. Nothing here drives a NIC, so that a worker thread
 * need not load what does.
 */
import { PacketFlag, type PacketPool } from '../../src/packet/pool.ts';
import { type Datagram, ETHERNET, hasRightChecksum, isUdp, UDP_PAYLOAD, udpFrame } from './packets.ts';

export const FLOWS = 16;
const PER_FLOW = 4;
export const TOTAL = FLOWS * PER_FLOW;
const FIRST_PORT = 10_000;
export const ECHO_PORT = 7;

export interface Peer {
  readonly mac: Uint8Array;
  readonly address: readonly number[];
  /** Ours, on the same wire. */
  readonly own: readonly number[];
}

/**
 * Datagram `index` of a NIC, of a length between the shortest and the longest that the link takes. From `TOTAL` on they are a flow of their
 * own: a device answers by the queue that a flow was sent by last.
 */
export function datagram(
  nic: { readonly mac: Uint8Array; readonly mtu: number },
  { mac, address, own }: Peer,
  index: number,
): Datagram {
  const longest = nic.mtu - (UDP_PAYLOAD - ETHERNET);
  const payload = Buffer.alloc(2 + ((index * 97) % (longest - 1)), index & 0xff);
  payload.writeUInt16BE(index);
  const port = FIRST_PORT + (index < TOTAL ? index % FLOWS : FLOWS);
  return { from: { mac: nic.mac, address: own, port }, to: { mac, address, port: ECHO_PORT }, payload };
}

/** Whether `frame` is what the echo server sends. */
export const isAnswer = (frame: Uint8Array): boolean =>
  isUdp(frame) && frame[UDP_PAYLOAD - 8] === 0 && frame[UDP_PAYLOAD - 7] === ECHO_PORT;

export const indexOf = (frame: Uint8Array): number => (frame[UDP_PAYLOAD] << 8) | frame[UDP_PAYLOAD + 1];

/** Throws unless `frame` is the answer to the datagram, byte for byte, with a right checksum. */
export function checkAnswer(frame: Uint8Array, { from, to, payload }: Datagram): void {
  const wanted = udpFrame({ from: to, to: from, payload });
  // From the addresses on: identification, flags and time to live of the header are the server's own.
  const addresses = ETHERNET + 12;
  const checksum = UDP_PAYLOAD - 2;
  const alike = (start: number, end: number) => wanted.subarray(start, end).equals(frame.subarray(start, end));
  if (
    frame.length !== wanted.length ||
    !alike(0, 12) ||
    !alike(addresses, checksum) ||
    !alike(UDP_PAYLOAD, frame.length)
  ) {
    throw new Error(`datagram ${indexOf(frame)} came back changed`);
  }
  if (!hasRightChecksum(frame)) throw new Error(`datagram ${indexOf(frame)} has a wrong checksum`);
}

/** Fills the checksum of `frame`, the bytes of packet `p`, if it was left open. */
export function completeChecksum(
  { flags, checksumStart, checksumOffset }: PacketPool,
  p: number,
  frame: Uint8Array,
): void {
  if ((flags[p] & PacketFlag.needsChecksum) !== 0) fill(frame, checksumStart[p], checksumOffset[p]);
}

/** What is left to whoever needs it (NEEDS_CSUM): from `start` to the end, into the field at `offset` behind it. */
function fill(frame: Uint8Array, start: number, offset: number): void {
  let sum = 0;
  for (let at = start; at < frame.length; at += 2) sum += (frame[at] << 8) | (frame[at + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  const value = ~sum & 0xffff || 0xffff;
  frame[start + offset] = value >> 8;
  frame[start + offset + 1] = value & 0xff;
}
