import { closeSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { createMemoryFile, Feature, type NicOptions, type PacketArena } from '../../src/index.ts';
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { MappingLedger } from '../../src/sys/mapping-ledger.ts';
import { mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { capture, cleanUp, isProtected, openPair, receive, saPair, until } from './support.ts';
import { Host, handOver, hire } from './worker-support.ts';

const files: number[] = [];

afterEach(async () => {
  await cleanUp();
  for (const fd of files.splice(0)) closeSync(fd);
});

const ARENA_BYTES = 256 * 1024;
const code = (name: string) => expect.objectContaining({ code: name });
const HEADER = Uint8Array.from({ length: 34 }, (_, i) => (i === 12 ? 0x88 : i === 13 ? 0xb5 : 2));

function memoryFile(): number {
  const fd = createMemoryFile(ARENA_BYTES);
  files.push(fd);
  return fd;
}

const byteAt = (i: number) => (i * 7 + (i >>> 8)) & 0xff;

function fill(u8: Uint8Array): void {
  for (let i = 0; i < u8.length; i++) u8[i] = byteAt(i);
}

type Piece = readonly [start: number, length: number];

/** The pieces of frame `n`. */
function piecesOf(n: number): readonly Piece[] {
  return n % 3 === 0
    ? [[(n * 997) % 200_000, 26 + (n % 1400)]]
    : [
        [(n * 613) % 200_000, 100 + (n % 300)],
        [(n * 179) % 200_000, 500],
      ];
}

const frameOf = (header: Uint8Array, pieces: readonly Piece[]) =>
  Buffer.concat([header, ...pieces.map(([at, size]) => Uint8Array.from({ length: size }, (_, i) => byteAt(at + i)))]);

async function wired(options: NicOptions = { ipsec: 'off' }) {
  const nic = { queuePairs: 2, workerQueues: 1, ...options };
  const pair = await openPair({ queuePairs: 2, nic }, { nic: { ipsec: options.ipsec ?? 'off' } });
  const [queue] = pair.a.workerQueues;
  return { ...pair, queue };
}

/** Sends frames from pieces of an arena of the thread, and checks them as they arrive, and that all pieces come back. */
async function exchange(
  host: Host,
  b: Awaited<ReturnType<typeof wired>>['b'],
  arena: string,
  count = 60,
): Promise<void> {
  const frames = Array.from({ length: count }, (_, n) => piecesOf(n));
  const sending = host.do('sendPieces', { index: 1, arena, header: HEADER, frames, sa: 0 });
  const got = await receive(b, count);
  expect(got.map(({ frame }) => frame.toString('hex'))).toEqual(
    frames.map((pieces) => frameOf(HEADER, pieces).toString('hex')),
  );
  const back = await sending;
  expect(back).toEqual(frames.flat().map(([start]) => start));
}

const KINDS: readonly (readonly [string, NicOptions])[] = [
  ['split rings', { ring: 'split' }],
  ['split rings without indirect descriptors', { ring: 'split', decline: [Feature.INDIRECT_DESC] }],
  ['packed rings', { ring: 'packed' }],
];

describe('memory of the application in a worker thread', () => {
  it.each(KINDS)('is sent where it is, lent by the NIC, over %s, and comes back', async (_, options) => {
    const { a, b, queue } = await wired({ ...options, ipsec: 'off' });
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    expect(() => queue.lendMemory(arena)).toThrow(code('QUEUE_GONE'));
    fill(arena.memory.u8);
    const host = await hire(queue);
    const handle = queue.lendMemory(arena);
    await host.do('openMemory', { index: 1, arena: 'lent', handle });
    await expect(host.do('openMemory', { index: 1, arena: 'again', handle })).rejects.toThrow('NO_ARENA');
    await exchange(host, b, 'lent');
    // What the one writes the other sees: it is one memory.
    arena.memory.u8[5] = 99;
    expect(await host.do('readMemory', { arena: 'lent', start: 5, length: 1 })).toEqual(Uint8Array.of(99));
    arena.memory.u8[5] = byteAt(5);
    expect(() => a.unregisterMemory(arena)).toThrow(code('ARENA_BUSY'));
    const packet = await host.do('hold', { index: 1, arena: 'lent' });
    await expect(host.do('unregisterMemory', { index: 1, arena: 'lent' })).rejects.toThrow('ARENA_BUSY');
    expect(await host.do('letGo', { index: 1, arena: 'lent', packet })).toBe(1);
    await exchange(host, b, 'lent', 20);
    await host.do('unregisterMemory', { index: 1, arena: 'lent' });
    expect(await host.do('readMemory', { arena: 'lent', start: 5, length: 1 })).toEqual(Uint8Array.of(0));
    expect(arena.memory.u8[5]).toBe(byteAt(5));
    await returned(() => a.unregisterMemory(arena));
    expect(() => queue.lendMemory(arena)).toThrow(code('NO_ARENA'));
  });

  it('may be registered by the thread, and goes when the thread lets go of it', async () => {
    const { a, b, queue } = await wired();
    const host = await hire(queue);
    const fd = memoryFile();
    const own = mapShared(fd, 0, ARENA_BYTES, { write: true });
    fill(own.u8);
    unmapMemory(own);
    const memory = { index: 1, arena: 'own', fd, offset: 0, size: ARENA_BYTES };
    await expect(host.do('registerMemory', { ...memory, offset: 5 })).rejects.toThrow('DMA_RANGE');
    await expect(host.do('registerMemory', { ...memory, fd: -1 })).rejects.toThrow('DMA_SEAL');
    await host.do('registerMemory', memory);
    await expect(host.do('registerMemory', memory)).rejects.toThrow('DMA_OVERLAP');
    expect(() => a.registerMemory(fd, 0, ARENA_BYTES)).toThrow(code('DMA_OVERLAP'));
    await exchange(host, b, 'own');
    await host.do('unregisterMemory', { index: 1, arena: 'own' });
    await returned(() => a.unregisterMemory(a.registerMemory(fd, 0, ARENA_BYTES)));
    // And with its queue.
    await host.do('registerMemory', memory);
    await host.do('close', { index: 1 });
    await returned(() => a.unregisterMemory(a.registerMemory(fd, 0, ARENA_BYTES)));
    await expect(host.do('registerMemory', memory)).rejects.toThrow('QUEUE_CLOSED');
  });

  it('is protected by an SA in software like any other packet', async () => {
    const { a, b, queue } = await wired({ ipsec: 'software' });
    const [frame] = capture('http-ipv4').filter(isProtected);
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    arena.memory.u8.set(frame.subarray(34), 1000);
    const host = await hire(queue);
    await host.do('openMemory', { index: 1, arena: 'lent', handle: queue.lendMemory(arena) });
    const { outbound, inbound } = saPair();
    const sa = await a.ipsec.addSa(outbound, { queue: 1 });
    const peer = await b.ipsec.addSa(inbound);
    const frames: Piece[][] = Array.from({ length: 5 }, () => [[1000, frame.length - 34]]);
    const header = frame.subarray(0, 34);
    const sending = host.do('sendPieces', { index: 1, arena: 'lent', header, frames, sa: sa.handle });
    const got = await receive(b, 5);
    expect(got.map(({ sa: handle }) => handle)).toEqual(Array(5).fill(peer.handle));
    expect(got.every((one) => one.frame.equals(frame))).toBe(true);
    expect(await sending).toEqual(Array(5).fill(1000));
  });
});

describe('memory that a thread has which dies', () => {
  it('is kept until nothing of it can be in the ring, and no other thread gets it by its handle', async () => {
    const { a, b, queue } = await wired();
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    const other = memoryFile();
    fill(arena.memory.u8);
    const host = new Host();
    const offered = await queue.transfer();
    await host.open(offered);
    await until(
      () => queue.state === 'open',
      () => queue.state,
    );
    const handle = queue.lendMemory(arena);
    await host.do('openMemory', { index: 1, arena: 'lent', handle });
    const own = { index: 1, arena: 'own', fd: other, offset: 0, size: ARENA_BYTES };
    await host.do('registerMemory', own);
    await exchange(host, b, 'lent', 10);
    const mapped = new MappingLedger(offered.ledger).entries.filter(({ size }) => size === ARENA_BYTES);
    const there = () => mapped.map(({ address }) => Buffer.from(ffi().view(address, ARENA_BYTES)));
    expect(there().map((bytes) => bytes[77])).toEqual([byteAt(77), 0]);
    const ended = new Promise<void>((resolve, reject) => {
      const stop = queue.onEnd(() => {
        stop();
        try {
          // The device has not reset the ring yet.
          expect(() => a.unregisterMemory(arena)).toThrow(code('ARENA_BUSY'));
          expect(() => a.registerMemory(other, 0, ARENA_BYTES)).toThrow(code('DMA_OVERLAP'));
          resolve();
        } catch (error) {
          reject(error);
        }
      });
    });
    await host.worker.terminate();
    await ended;
    // What the thread had mapped is gone. The memory itself is the application's, and as it was.
    expect(there().flatMap((bytes) => [...new Set(bytes)])).toEqual([0, 0]);
    expect(arena.memory.u8[77]).toBe(byteAt(77));
    const next = new Host();
    await handOver(queue, next);
    await expect(next.do('openMemory', { index: 1, arena: 'lent', handle })).rejects.toThrow('NO_ARENA');
    await next.do('openMemory', { index: 1, arena: 'lent', handle: queue.lendMemory(arena) });
    await next.do('registerMemory', own);
    await exchange(next, b, 'lent', 10);
    await next.do('close', { index: 1 });
    await returned(() => a.unregisterMemory(arena));
    await returned(() => a.unregisterMemory(a.registerMemory(other, 0, ARENA_BYTES)));
  });

  it('comes back when the device has reset the pair, whether or not another thread is to have it', async () => {
    const { a, queue } = await wired();
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    const host = await hire(queue);
    await host.do('openMemory', { index: 1, arena: 'lent', handle: queue.lendMemory(arena) });
    await host.do('hold', { index: 1, arena: 'lent' });
    await host.worker.terminate();
    await returned(() => a.unregisterMemory(arena));
    await handOver(queue, new Host());
  });

  it('does not hinder the end of the NIC', async () => {
    const { a, queue } = await wired();
    const arena: PacketArena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    fill(arena.memory.u8);
    const host = await hire(queue);
    await host.do('openMemory', { index: 1, arena: 'lent', handle: queue.lendMemory(arena) });
    await host.do('hold', { index: 1, arena: 'lent' });
    await a.close();
    const check = mapShared(files[0], 0, ARENA_BYTES, { write: false });
    expect(check.u8[99]).toBe(byteAt(99));
    unmapMemory(check);
    expect(await host.do('readMemory', { arena: 'lent', start: 99, length: 1 })).toEqual(Uint8Array.of(0));
    expect(await host.do('broken', { index: 1 })).toBe('NIC_CLOSED');
  });
});

/** Does what fails until the thread's word that it has let go has come. */
async function returned(action: () => void): Promise<void> {
  let error: unknown = null;
  const attempt = () => {
    try {
      action();
      return true;
    } catch (reason) {
      error = reason;
      return false;
    }
  };
  await until(attempt, () => String(error));
}
