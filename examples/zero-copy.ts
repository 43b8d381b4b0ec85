/**
 * Sends memory of the application without a copy: a file is read into a memfd once, and each frame is 14 bytes of header in a packet
 * and a piece of that memory behind it.
 *
 * ```
 * vipsec device --socket /tmp/nic.sock &
 * node dist/examples/zero-copy.js vfio-user:/tmp/nic.sock /usr/bin/env
 * ```
 *
 * A device without a link sends every frame back; the bytes that come are compared with the file. Prints how many frames went round.
 */
import { closeSync, readFileSync } from 'node:fs';
import { createMemoryFile, type Nic, NO_PACKET, openNic } from '../src/index.ts';

const PIECE = 1400;
/** Frames under way at one time, so that each finds a place in the receive ring. */
const WINDOW = 64;
/** Broadcast, from a local address, with the first EtherType for experiments. */
const HEADER = Uint8Array.of(255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 0x88, 0xb5);

/** Sends `bytes` in frames, and returns what came back, in order. */
async function sendAround(nic: Nic, bytes: Uint8Array): Promise<Uint8Array[]> {
  const [{ rx, tx }] = nic.queues;
  const pool = nic.packets;
  const fd = createMemoryFile(bytes.length);
  const pages = Math.ceil(bytes.length / 4096) * 4096;
  const arena = nic.registerMemory(fd, 0, pages);
  closeSync(fd);
  arena.memory.u8.set(bytes);

  const frames = Math.ceil(bytes.length / PIECE);
  const packet = new Uint32Array(1);
  const arrived = new Uint32Array(WINDOW);
  const done = new Uint32Array(WINDOW);
  const received: Uint8Array[] = [];
  let sent = 0;
  while (received.length < frames || arena.inFlight > 0) {
    if (nic.broken !== null) throw nic.broken;
    while (sent < frames && sent - received.length < WINDOW && pool.allocate(packet, 1) === 1) {
      const start = sent * PIECE;
      pool.write(packet[0], HEADER);
      const piece = pool.refer(arena, start, Math.min(PIECE, bytes.length - start));
      pool.next[packet[0]] = piece;
      if (piece === NO_PACKET || tx.burst(packet, 1) === 0) {
        pool.freeChains(packet, 1);
        break;
      }
      sent++;
    }
    const n = rx.burst(arrived, WINDOW);
    for (let i = 0; i < n; i++) received.push(pool.readChain(arrived[i]).slice(HEADER.length));
    pool.freeChains(arrived, n);
    tx.reclaim();
    // What the device is done with could be overwritten now.
    arena.reclaim(done);
    if (n === 0) await new Promise((resolve) => setImmediate(resolve));
  }
  nic.unregisterMemory(arena);
  return received;
}

const [address, path] = process.argv.slice(2);
if (address === undefined || path === undefined) {
  process.stderr.write('usage: zero-copy DEVICE FILE\n');
  process.exit(2);
}
await using nic = await openNic(address, { ipsec: 'off' });
const bytes = readFileSync(path);
const frames = await sendAround(nic, bytes);
const same = Buffer.concat(frames).equals(bytes);
process.stdout.write(`${frames.length} frames, ${bytes.length} bytes, ${same ? 'all as they were' : 'NOT the same'}\n`);
if (!same) process.exitCode = 1;
