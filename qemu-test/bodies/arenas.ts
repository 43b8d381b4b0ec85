/**
 * What an application does that brings its own memory: payloads are sent from where they are, and what arrives is in a file of the
 * application's, where it finds it through a mapping of its own.
 */
import { closeSync } from 'node:fs';
import { createMemoryFile, type Nic, NO_PACKET, openNic, type PacketArena } from '../../src/index.ts';
import { mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { same } from '../guest/guest.ts';
import { checkAnswer, completeChecksum, datagram, indexOf, isAnswer, type Peer, TOTAL } from './datagrams.ts';
import { poll } from './frames.ts';
import { UDP_PAYLOAD, udpFrame } from './packets.ts';
import type { Place } from './place.ts';

type Ring = 'split' | 'packed';

/** Of each of the two files. */
const BYTES = 4 << 20;
/** Payloads lie so far apart; every second one is sent in two pieces. */
const STEP = 2048;
const IN_FLIGHT = 24;
const BURST = 32;
const TIMEOUT_MS = 20_000;

export const arenaName = (ring: Ring): string =>
  `${ring}: packets are sent from, and arrive in, memory of the application`;

export async function arenaBody(place: Place, ring: Ring, peer: Peer): Promise<void> {
  await place.check(arenaName(ring), async () => {
    const sending = createMemoryFile(BYTES);
    const receiving = createMemoryFile(BYTES);
    const mapped = mapShared(receiving, 0, BYTES, { write: false });
    try {
      const packetMemory = { fd: receiving, offset: 0, size: BYTES };
      await using nic = await openNic(place.address, { ring, ipsec: 'off', packetMemory });
      const arena = nic.registerMemory(sending, 0, BYTES);
      return await exchange(nic, arena, mapped.u8, peer);
    } finally {
      unmapMemory(mapped);
      closeSync(sending);
      closeSync(receiving);
    }
  });
}

/** Sends all datagrams, and checks the answers where they are: in `memory`. */
async function exchange(nic: Nic, arena: PacketArena, memory: Uint8Array, peer: Peer): Promise<string> {
  const { packets } = nic;
  const [{ rx, tx }] = nic.queues;
  const burst = new Uint32Array(BURST);
  const starts = new Uint32Array(2 * TOTAL);
  const missing = new Set(Array.from({ length: TOTAL }, (_, i) => i));
  let sent = 0;
  let collected = 0;
  let pieces = 0;
  const step = () => {
    if (nic.broken !== null) throw nic.broken;
    tx.reclaim();
    collected += arena.reclaim(starts);
    while (sent < TOTAL && sent - (TOTAL - missing.size) < IN_FLIGHT) {
      const added = send(nic, arena, udpFrame(datagram(nic, peer, sent)), sent);
      if (added === 0) break;
      pieces += added;
      sent++;
    }
    const n = rx.burst(burst, BURST);
    for (let i = 0; i < n; i++) {
      const at = packets.offset[burst[i]];
      const frame = memory.slice(at, at + packets.length[burst[i]]);
      if (!isAnswer(frame)) continue;
      completeChecksum(packets, burst[i], frame);
      checkAnswer(frame, datagram(nic, peer, indexOf(frame)));
      if (!missing.delete(indexOf(frame))) throw new Error(`datagram ${indexOf(frame)} came twice`);
    }
    packets.free(burst, n);
    return missing.size === 0 && collected === pieces;
  };
  await poll(step, TIMEOUT_MS, 'the echo of what was sent from an arena');
  same('pieces in packets', arena.inFlight, 0);
  nic.unregisterMemory(arena);
  return `${TOTAL} datagrams, ${pieces} pieces`;
}

/** Sends the headers of `frame` from a slot and its payload from the arena; returns the number of pieces, 0 when there is no room. */
function send({ packets, queues }: Nic, arena: PacketArena, frame: Buffer, index: number): number {
  const one = new Uint32Array(1);
  const [{ tx }] = queues;
  if (tx.room < 4 || packets.references.available < 2 || packets.allocate(one, 1) === 0) return 0;
  packets.write(one[0], frame.subarray(0, UDP_PAYLOAD));
  const at = (index * STEP) % BYTES;
  arena.memory.u8.set(frame.subarray(UDP_PAYLOAD), at);
  const bytes = frame.length - UDP_PAYLOAD;
  const first = index % 2 === 0 ? bytes : bytes >>> 1;
  const list = [packets.refer(arena, at, first)];
  if (first < bytes) list.push(packets.refer(arena, at + first, bytes - first));
  if (list.includes(NO_PACKET)) throw new Error('no reference is left');
  let last = one[0];
  for (const p of list) {
    packets.next[last] = p;
    last = p;
  }
  if (tx.burst(one, 1) === 1) return list.length;
  throw new Error('a ring with room takes no packet');
}
