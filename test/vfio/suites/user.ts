import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { VfioError } from '../../../src/errors.ts';
import { EventFd } from '../../../src/sys/eventfd.ts';
import * as libc from '../../../src/sys/libc.ts';
import { mapShared, unmapMemory } from '../../../src/sys/memory.ts';
import type { PciFunction } from '../../../src/vfio/function.ts';
import * as protocol from '../../../src/vfio/protocol.ts';
import { openVfioUser, type VfioUserOptions } from '../../../src/vfio/user.ts';
import { backing } from '../../sys/backing.ts';
import { type Fake, type FakeDevice, plainConfig, type Rule, startFake } from '../fake.ts';

const { Command, HeaderFlag } = protocol;
const READ_WRITE = protocol.RegionFlag.read | protocol.RegionFlag.write;
const code = (expected: string) => expect.objectContaining({ name: 'VfioError', code: expected });
const words = (...values: number[]) => new Uint8Array(Uint32Array.from(values).buffer);
/** Waits until what the worker thread has posted is here. */
const settle = () => new Promise<void>((resolve) => setTimeout(resolve, 30));

/** Deadlines in ms: of sessions in which somebody is silent, and of the others, on a machine that is busy. */
const IMPATIENT = 150;
const PATIENT = 10_000;

const openDescriptors = () => readdirSync('/proc/self/fd').length;

export function userSuite(): void {
  const fakes: Fake[] = [];
  const functions: PciFunction[] = [];

  async function fake(rules: readonly Rule[] = [], device: FakeDevice = {}): Promise<Fake> {
    const started = await startFake(rules, device);
    fakes.push(started);
    return started;
  }
  function open(server: Fake, options: VfioUserOptions = {}): PciFunction {
    const fn = openVfioUser(server.path, { timeoutMs: PATIENT, ...options });
    functions.push(fn);
    return fn;
  }
  async function connected(rules: readonly Rule[] = [], device: FakeDevice = {}, options: VfioUserOptions = {}) {
    const server = await fake(rules, device);
    return { server, fn: open(server, options) };
  }
  /** Runs `call`, which is to fail with `expected`, and checks that from then on everything fails at once. */
  function losesTheDevice(fn: PciFunction, call: () => unknown, expected: string): void {
    const memory = fn.allocateDma(4096);
    expect(fn.gone).toBe(false);
    const start = performance.now();
    expect(call).toThrow(code(expected));
    expect(performance.now() - start).toBeLessThan(PATIENT / 2);
    expect(fn.gone).toBe(true);
    const later = performance.now();
    const calls: (() => unknown)[] = [
      () => fn.bar(0).read32(0),
      () => fn.bar(0).write8(0, 1),
      () => fn.config.read16(0),
      () => fn.allocateDma(4096),
      () => fn.setInterrupts([]) ?? fn.setInterrupts([1]),
      () => fn.reset(),
      () => fn.freeDma(memory),
    ];
    for (const each of calls) expect(each).toThrow(code('DEVICE_GONE'));
    expect(backing(memory.address)).toBe('');
    fn.close();
    // Seven calls and a close: not one of them waits for an answer.
    expect(performance.now() - later).toBeLessThan(7 * IMPATIENT);
  }

  afterEach(async () => {
    for (const fn of functions.splice(0)) fn.close();
    for (const server of fakes.splice(0)) await server.stop();
  });

  describe('openVfioUser', () => {
    it('agrees on a version and learns what the function has', async () => {
      const { server, fn } = await connected();
      expect(fn.address).toBe(`vfio-user:${server.path}`);
      expect(fn.config.size).toBe(256);
      expect([0, 1, 2, 3, 4, 5].map((i) => fn.bar(i).size)).toEqual([4096, 0, 0, 0, 0, 0]);
      expect(fn.interruptVectors).toBe(6);
      expect(fn.gone).toBe(false);
      await settle();
      const [version] = server.requests(Command.version);
      expect(protocol.decodeVersion(version.payload)).toMatchObject({ major: 0, minor: 0 });
      expect(server.requests(Command.deviceGetRegionInfo)).toHaveLength(8);
    });

    it.each([
      ['is not there', 'missing'],
      ['is no socket', 'file'],
      ['has no listener', 'dead'],
      ['is too long for a socket', 'x'.repeat(150)],
    ])('throws CONNECT_FAILED when the path %s', (_, name) => {
      const directory = mkdtempSync(join(tmpdir(), 'connect-'));
      writeFileSync(join(directory, 'file'), '');
      const dead = libc.unixSocket();
      libc.bindUnix(dead, join(directory, 'dead'), 0o600);
      libc.close(dead);
      const path = join(directory, name);
      expect(() => openVfioUser(path)).toThrow(code('CONNECT_FAILED'));
      const hint = name.length < 100 ? 'is the device process running' : 'a shorter name';
      expect(() => openVfioUser(path)).toThrow(expect.objectContaining({ hint: expect.stringContaining(hint) }));
      rmSync(directory, { recursive: true });
    });

    const json = (text: string) => new TextEncoder().encode(`\0\0\0\0${text}\0`);
    const version = (major: number, minor: number) => new Uint8Array([major, 0, minor, 0]);
    const rule = (reply: Rule['reply']) => ({ command: Command.version, reply: reply ?? {} });
    it.each<[string, Rule, string]>([
      ['closes the connection', { command: 1, close: true }, 'VERSION_REFUSED'],
      ['answers with an error', rule({ flags: 0x21, error: 22, payload: new Uint8Array(0) }), 'VERSION_REFUSED'],
      ['speaks another major version', rule({ payload: version(1, 0) }), 'VERSION_REFUSED'],
      ['speaks a later minor version than was proposed', rule({ payload: version(0, 1) }), 'VERSION_REFUSED'],
      ['never answers', { command: 1, stall: true }, 'NOT_VFIO_USER'],
      ['answers with text', { command: 1, raw: Buffer.from('HTTP/1.1 400 Bad Request\r\n\r\n') }, 'NOT_VFIO_USER'],
      ['answers with zeros', { command: 1, raw: new Uint8Array(64) }, 'NOT_VFIO_USER'],
      ['answers with ones', { command: 1, raw: new Uint8Array(64).fill(0xff) }, 'NOT_VFIO_USER'],
      ['answers to another command', rule({ command: 4 }), 'NOT_VFIO_USER'],
      ['answers to another id', rule({ id: 1 }), 'NOT_VFIO_USER'],
      ['sends a request instead', rule({ flags: 0 }), 'NOT_VFIO_USER'],
      ['breaks off in its answer', { command: 1, cut: 18 }, 'VERSION_REFUSED'],
      ['answers with too short a message', rule({ payload: new Uint8Array(2) }), 'PROTOCOL'],
      ['answers with broken JSON', rule({ payload: json('{"capabilities"') }), 'PROTOCOL'],
      ['answers with capabilities of a wrong type', rule({ payload: json('{"capabilities":7}') }), 'PROTOCOL'],
      [
        'answers with a wrong capability',
        rule({ payload: json('{"capabilities":{"max_msg_fds":"all"}}') }),
        'PROTOCOL',
      ],
    ])('throws a typed error at once when the server %s', async (_, badRule, expected) => {
      const server = await fake([badRule]);
      const before = openDescriptors();
      const start = performance.now();
      expect(() => open(server, { timeoutMs: badRule.stall ? IMPATIENT : PATIENT })).toThrow(code(expected));
      expect(performance.now() - start).toBeLessThan(PATIENT / 2);
      await server.closed();
      expect(openDescriptors()).toBe(before);
    });

    it('is not held up by a server that greets with text', async () => {
      const server = await fake([], { greeting: '220 mail.example.org ESMTP ready\r\n' });
      expect(() => open(server)).toThrow(code('NOT_VFIO_USER'));
    });

    it('throws NOT_VFIO_USER when the server repeats what it is sent', async () => {
      const directory = mkdtempSync(join(tmpdir(), 'echo-'));
      // The client blocks, so the echo needs a thread of its own.
      const echo = `require('node:net').createServer((s) => s.pipe(s)).listen(${JSON.stringify(join(directory, 's'))}, () =>
        require('node:worker_threads').parentPort.postMessage('up'));`;
      const worker = new Worker(echo, { eval: true });
      await new Promise((resolve) => worker.once('message', resolve));
      expect(() => openVfioUser(join(directory, 's'), { timeoutMs: PATIENT })).toThrow(code('NOT_VFIO_USER'));
      await worker.terminate();
      rmSync(directory, { recursive: true });
    });

    it('gives up on a server that accepts but never reads', async () => {
      const directory = mkdtempSync(join(tmpdir(), 'mute-'));
      const path = join(directory, 's');
      const server = await new Promise<Server>((resolve) => {
        const listening = createServer().listen(path, () => resolve(listening));
      });
      const start = performance.now();
      expect(() => openVfioUser(path, { timeoutMs: 100 })).toThrow(code('NOT_VFIO_USER'));
      expect(performance.now() - start).toBeLessThan(1000);
      await new Promise((resolve) => server.close(resolve));
      rmSync(directory, { recursive: true });
    });

    it.each<[string, Rule, string]>([
      [
        'refuses DEVICE_GET_INFO',
        { command: 4, reply: { flags: 0x21, error: 38, payload: words() } },
        'DEVICE_REFUSED',
      ],
      ['is no PCI device', { command: 4, reply: { payload: words(16, 1, 9, 5) } }, 'NOT_PCI'],
      ['has no configuration space', { command: 4, reply: { payload: words(16, 3, 7, 5) } }, 'NOT_PCI'],
      ['sends a short DEVICE_GET_INFO', { command: 4, reply: { payload: words(16, 3, 9) } }, 'PROTOCOL'],
      ['sends a long DEVICE_GET_INFO', { command: 4, reply: { payload: words(16, 3, 9, 5, 0) } }, 'PROTOCOL'],
      ['sends a short region info', { command: 5, nth: 2, reply: { payload: words(32, 3, 1, 0) } }, 'PROTOCOL'],
      ['describes another region', { command: 5, reply: { payload: words(32, 3, 5, 0, 4096, 0, 0, 0) } }, 'PROTOCOL'],
      [
        'has no descriptor for a mappable region',
        { command: 5, reply: { payload: words(32, 7, 0, 0, 4096, 0, 0, 0) } },
        'PROTOCOL',
      ],
      [
        'needs endless room for a region',
        { command: 5, reply: { payload: words(1e9, 11, 0, 32, 4096, 0, 0, 0) } },
        'PROTOCOL',
      ],
      [
        'wants more room but not really',
        { command: 5, reply: { payload: words(100, 11, 0, 32, 4096, 0, 0, 0) } },
        'PROTOCOL',
      ],
      [
        'has a configuration space of 100 bytes',
        { command: 5, nth: 8, reply: { payload: words(32, 3, 7, 0, 100, 0, 0, 0) } },
        'PROTOCOL',
      ],
      [
        'has a read-only configuration space',
        { command: 5, nth: 8, reply: { payload: words(32, 1, 7, 0, 256, 0, 0, 0) } },
        'PROTOCOL',
      ],
      ['claims three thousand vectors', { command: 7, reply: { payload: words(16, 1, 2, 3000) } }, 'PROTOCOL'],
      ['describes other interrupts', { command: 7, reply: { payload: words(16, 1, 1, 4) } }, 'PROTOCOL'],
      ['dies', { command: 7, close: true }, 'DEVICE_GONE'],
    ])('throws and closes everything when the server %s', async (_, badRule, expected) => {
      const server = await fake([badRule]);
      expect(() => open(server)).toThrow(code(expected));
      await server.closed();
    });

    it('closes descriptors that it did not ask for', async () => {
      const fd = libc.memfdCreate('surprise');
      const before = openDescriptors();
      for (const command of [Command.version, Command.deviceGetInfo, Command.deviceGetRegionInfo]) {
        const server = await fake([{ command, reply: { fds: [fd] } }]);
        if (command === Command.version) open(server).close();
        else expect(() => open(server)).toThrow(code('PROTOCOL'));
        await server.stop();
        fakes.pop();
      }
      expect(openDescriptors()).toBe(before);
      libc.close(fd);
    });

    it('has no interrupts without MSI-X', async () => {
      expect((await connected([], { irqCount: 2 })).fn.interruptVectors).toBe(0);
      expect((await connected([], { irqFlags: 0 })).fn.interruptVectors).toBe(0);
    });
  });

  describe('regions', () => {
    const pattern = new Uint8Array(64).map((_, i) => i + 1);
    const device = { regions: [{ index: 0, flags: READ_WRITE, bytes: pattern }] };

    it('reads and writes each width with one message of exactly that width', async () => {
      const { server, fn } = await connected([], device);
      const bar = fn.bar(0);
      expect([bar.read8(1), bar.read16(2), bar.read32(4)]).toEqual([0x02, 0x0403, 0x08070605]);
      bar.write8(0, 0xaa);
      bar.write16(2, 0xbbcc);
      bar.write32(4, 0xddeeff11);
      expect([bar.read32(0), bar.read32(4)]).toEqual([0xbbcc02aa, 0xddeeff11]);
      fn.config.write16(4, 6);
      expect(fn.config.read16(4)).toBe(6);
      await settle();
      const writes = server
        .requests(Command.regionWrite)
        .map((seen) => protocol.decodeRegionAccess(seen.payload, true));
      expect(writes.map(({ region, offset, count }) => [region, offset, count])).toEqual([
        [0, 0, 1],
        [0, 2, 2],
        [0, 4, 4],
        [7, 4, 2],
      ]);
    });

    it('refuses accesses that are not aligned or not inside without asking the device', async () => {
      const { server, fn } = await connected([], device);
      const bar = fn.bar(0);
      for (const offset of [-4, 2, 61, 64, 0.5, Number.NaN, 2 ** 32]) {
        expect(() => bar.read32(offset)).toThrow(RangeError);
        expect(() => bar.write32(offset, 0)).toThrow(RangeError);
      }
      expect(() => fn.bar(1).read8(0)).toThrow(RangeError);
      for (const index of [-1, 6, 7, 0.5]) expect(() => fn.bar(index)).toThrow(RangeError);
      await settle();
      expect(server.requests(Command.regionRead)).toHaveLength(0);
    });

    it('respects regions that can only be read, or only be written', async () => {
      const regions = [
        { index: 0, flags: protocol.RegionFlag.read, bytes: pattern },
        { index: 1, flags: protocol.RegionFlag.write, bytes: pattern },
      ];
      const { fn } = await connected([], { regions });
      expect(fn.bar(0).read8(0)).toBe(1);
      expect(() => fn.bar(0).write8(0, 1)).toThrow(code('REGION_ACCESS'));
      expect(() => fn.bar(1).read8(0)).toThrow(code('REGION_ACCESS'));
      fn.bar(1).write8(0, 1);
      expect(fn.gone).toBe(false);
    });

    it('goes on after an error reply, which names the errno', async () => {
      const { fn } = await connected(
        [{ command: Command.regionRead, nth: 1, reply: { flags: 0x21, error: 1, payload: words() } }],
        device,
      );
      expect(() => fn.bar(0).read8(0)).toThrow(code('DEVICE_REFUSED'));
      expect(fn.gone).toBe(false);
      expect(fn.bar(0).read8(0)).toBe(1);
    });

    it('takes a reply that comes byte by byte', async () => {
      const { fn } = await connected([{ command: Command.regionRead, dribble: true }], device);
      expect(fn.bar(0).read32(0)).toBe(0x04030201);
    });

    const access = (region: number, offset: number, count: number, ...data: number[]) =>
      protocol.encodeRegionReply(region, offset, count, new Uint8Array(data));
    it.each<[string, Omit<Rule, 'command'>, string]>([
      ['of another id', { reply: { id: 1 } }, 'PROTOCOL'],
      ['to another command', { reply: { command: Command.regionWrite } }, 'PROTOCOL'],
      ['with less data than asked for', { reply: { payload: access(0, 0, 2, 1, 2) } }, 'PROTOCOL'],
      ['with more data than asked for', { reply: { payload: access(0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8) } }, 'PROTOCOL'],
      ['with a count that its data does not match', { reply: { payload: access(0, 0, 4, 1, 2) } }, 'PROTOCOL'],
      ['about another region', { reply: { payload: access(1, 0, 4, 1, 2, 3, 4) } }, 'PROTOCOL'],
      ['about another offset', { reply: { payload: access(0, 4, 4, 1, 2, 3, 4) } }, 'PROTOCOL'],
      ['that is cut off by its size', { reply: { payload: new Uint8Array(3) } }, 'PROTOCOL'],
      ['without payload', { reply: { payload: new Uint8Array(0) } }, 'PROTOCOL'],
      ['that claims less than a header', { reply: { size: 8 } }, 'PROTOCOL'],
      ['that claims two gigabytes', { reply: { size: 0x80000000 } }, 'PROTOCOL'],
      ['of an unknown message type', { reply: { flags: 2 } }, 'PROTOCOL'],
      ['that claims more than it sends', { reply: { size: 4000 } }, 'TIMEOUT'],
      ['that breaks off in the header', { cut: 10 }, 'DEVICE_GONE'],
      ['that breaks off in the payload', { cut: 30 }, 'DEVICE_GONE'],
      ['that never comes', { stall: true }, 'TIMEOUT'],
      ['that is the end of the connection', { close: true }, 'DEVICE_GONE'],
    ])('loses the device over a reply %s', async (_, badRule, expected) => {
      const timeoutMs = expected === 'TIMEOUT' ? IMPATIENT : PATIENT;
      const { fn } = await connected([{ command: Command.regionRead, ...badRule }], {}, { timeoutMs });
      losesTheDevice(fn, () => fn.bar(0).read32(0), expected);
    });

    it('loses the device over a descriptor that comes with a reply, and closes it', async () => {
      const fd = libc.memfdCreate('surprise');
      const { fn } = await connected([{ command: Command.regionRead, reply: { fds: [fd] } }]);
      losesTheDevice(fn, () => fn.bar(0).read32(0), 'PROTOCOL');
      libc.close(fd);
    });

    it('keeps the first reason as the cause of later errors', async () => {
      const { fn } = await connected([{ command: Command.regionRead, stall: true }], {}, { timeoutMs: 50 });
      const reasons: VfioError[] = [];
      fn.onGone?.((reason) => reasons.push(reason));
      expect(() => fn.bar(0).read8(0)).toThrow(code('TIMEOUT'));
      fn.onGone?.((reason) => reasons.push(reason));
      expect(reasons.map((reason) => reason.code)).toEqual(['TIMEOUT', 'TIMEOUT']);
      try {
        fn.bar(0).read8(0);
      } catch (error) {
        expect(error).toBeInstanceOf(VfioError);
        expect((error as VfioError).cause).toBe(reasons[0]);
      }
      expect.assertions(4);
    });

    it('posts writes to BARs when told to, in order with what follows, but never those to configuration space', async () => {
      const { server, fn } = await connected([], device, { postWrites: true });
      for (let i = 0; i < 100; i++) fn.bar(0).write32(0, i);
      expect(fn.bar(0).read32(0)).toBe(99);
      fn.config.write16(4, 2);
      await settle();
      const flags = server.requests(Command.regionWrite).map((seen) => seen.flags);
      expect(flags).toEqual([...new Array(100).fill(HeaderFlag.noReply), 0]);
    });
  });

  describe('mapped regions', () => {
    let fd: number;
    let file: ReturnType<typeof mapShared>;
    beforeEach(() => {
      fd = libc.memfdCreate('bar', libc.MemfdFlag.cloexec | libc.MemfdFlag.allowSealing);
      libc.ftruncate(fd, 0x5000);
      libc.fcntl(fd, libc.FcntlCommand.addSeals, libc.Seal.shrink);
      file = mapShared(fd, 0, 0x5000, { write: true });
    });
    afterEach(() => {
      unmapMemory(file);
      libc.close(fd);
    });
    const flags = READ_WRITE | protocol.RegionFlag.mmap;
    /** A sparse mmap capability with areas of [offset, size]. */
    const sparse = (...areas: [number, number][]) =>
      words(0x10001, 0, areas.length, 0, ...areas.flatMap(([offset, size]) => [offset, 0, size, 0]));

    it('are read and written without messages', async () => {
      const regions = [{ index: 2, flags, bytes: new Uint8Array(0x4000), fd, offset: 0x1000 }];
      const { server, fn } = await connected([], { regions });
      file.u32[0x1000 / 4 + 1] = 0xcafef00d;
      expect(fn.bar(2).read32(4)).toBe(0xcafef00d);
      expect(fn.bar(2).read16(6)).toBe(0xcafe);
      expect(fn.bar(2).read8(4)).toBe(0x0d);
      fn.bar(2).write32(0x3ffc, 0x12345678);
      fn.bar(2).write16(0x3ff8, 0xabcd);
      fn.bar(2).write8(0x3ff0, 0xef);
      expect([file.u32[0x4ffc / 4], file.u16[0x4ff8 / 2], file.u8[0x4ff0]]).toEqual([0x12345678, 0xabcd, 0xef]);
      expect(() => fn.bar(2).read32(0x4000)).toThrow(RangeError);
      await settle();
      expect(server.requests(Command.regionRead)).toHaveLength(0);
      expect(server.requests(Command.regionWrite)).toHaveLength(0);
    });

    it('are not mapped when the server could make the file shorter under us', async () => {
      const unsealed = libc.memfdCreate('bar', libc.MemfdFlag.cloexec | libc.MemfdFlag.allowSealing);
      libc.ftruncate(unsealed, 0x4000);
      const regions = [{ index: 2, flags, bytes: new Uint8Array(0x4000).fill(5), fd: unsealed }];
      const { server, fn } = await connected([], { regions });
      expect(fn.bar(2).read32(0)).toBe(0x05050505);
      libc.ftruncate(unsealed, 0);
      expect(fn.bar(2).read32(0x3000)).toBe(0x05050505);
      await settle();
      expect(server.requests(Command.regionRead)).toHaveLength(2);
      libc.close(unsealed);
    });

    it('are mapped where the server says, the rest by messages', async () => {
      const regions = [
        { index: 2, flags, bytes: new Uint8Array(0x4000), fd, caps: sparse([0x1000, 0x1000], [0x3000, 0x1000]) },
      ];
      const { server, fn } = await connected([], { regions });
      file.u8.fill(0x11);
      expect([0, 0x1000, 0x1ffc, 0x2000, 0x2ffc, 0x3000, 0x3ffc].map((at) => fn.bar(2).read32(at))).toEqual([
        0, 0x11111111, 0x11111111, 0, 0, 0x11111111, 0x11111111,
      ]);
      await settle();
      expect(server.requests(Command.regionRead)).toHaveLength(3);
    });

    it('are asked for again with more room when they have many areas', async () => {
      const areas = Array.from({ length: 70 }, (): [number, number] => [0x1000, 0x1000]);
      const { server, fn } = await connected([], {
        regions: [{ index: 0, flags, bytes: new Uint8Array(0x4000), fd, caps: sparse(...areas) }],
      });
      file.u32[0x400] = 7;
      expect(fn.bar(0).read32(0x1000)).toBe(7);
      await settle();
      const sizes = server
        .requests(Command.deviceGetRegionInfo)
        .map((seen) => protocol.decodeInfoRequest('', seen.payload).argsz);
      expect(sizes.slice(0, 2)).toEqual([1024, 32 + 16 + 70 * 16]);
    });

    it('stay with messages where an area is not whole pages', async () => {
      const regions = [
        { index: 0, flags, bytes: new Uint8Array(0x4000), fd, caps: sparse([0x800, 0x1000], [0x1000, 0x10], [0, 0]) },
      ];
      const { fn } = await connected([], { regions });
      file.u8.fill(0x22);
      expect([0, 0x800, 0x1000].map((at) => fn.bar(0).read32(at))).toEqual([0, 0, 0]);
    });

    it('do not post writes, so that mapped and other accesses stay in order', async () => {
      const regions = [
        { index: 0, flags: READ_WRITE, bytes: new Uint8Array(64) },
        { index: 2, flags, bytes: new Uint8Array(0x4000), fd },
      ];
      const { server, fn } = await connected([], { regions }, { postWrites: true });
      fn.bar(0).write32(0, 1);
      await settle();
      expect(server.requests(Command.regionWrite).map((seen) => seen.flags)).toEqual([0]);
    });

    it('are out of reach once the function is gone or closed', async () => {
      const regions = [{ index: 2, flags, bytes: new Uint8Array(0x4000), fd }];
      const { fn } = await connected([{ command: Command.deviceReset, close: true }], { regions });
      expect(() => fn.reset()).toThrow(code('DEVICE_GONE'));
      expect(() => fn.bar(2).read32(0)).toThrow(code('DEVICE_GONE'));
      const other = (await connected([], { regions })).fn;
      other.close();
      expect(() => other.bar(2).write32(0, 1)).toThrow(code('DEVICE_GONE'));
    });

    const loop = words(0x10001, 32, 0, 0);
    it.each<[string, Uint8Array | undefined, number, string]>([
      ['loop', loop, 0, 'CAPABILITY_LOOP'],
      ['claim more areas than they have', words(0x10001, 0, 9, 0), 0, 'CAPABILITY_BOUNDS'],
      ['point outside of the message', words(0x10001, 4096, 0, 0), 0, 'CAPABILITY_BOUNDS'],
      ['name an area outside of the region', sparse([0x3000, 0x2000]), 0, 'CAPABILITY_BOUNDS'],
      ['lie beyond the end of the file', undefined, 0x2000, 'PROTOCOL'],
    ])('are refused when their description %s', async (_, caps, offset, expected) => {
      const region = { index: 0, flags, bytes: new Uint8Array(0x4000), fd, offset };
      const server = await fake([], { regions: [caps === undefined ? region : { ...region, caps }] });
      const before = openDescriptors();
      expect(() => open(server)).toThrow(code(expected));
      await server.closed();
      expect(openDescriptors()).toBe(before);
    });
  });

  describe('DMA', () => {
    it('maps memory with a descriptor in which the server finds it, and takes it back', async () => {
      const { server, fn } = await connected();
      const memory = fn.allocateDma(6000);
      expect(memory.size).toBe(8192);
      expect(
        fn.iovaRanges.some(({ start, last }) => start <= memory.iova && memory.iova + memory.size - 1 <= last),
      ).toBe(true);
      await settle();
      const [seen] = server.requests(Command.dmaMap);
      const map = protocol.decodeDmaMap(seen.payload);
      expect(map).toEqual({ flags: 3, offset: 0, address: memory.iova, size: 8192 });
      const theirs = mapShared(seen.fds[0], map.offset, map.size, { write: true });
      theirs.u32[5] = 0x55aa55aa;
      expect(memory.u32[5]).toBe(0x55aa55aa);
      unmapMemory(theirs);
      fn.freeDma(memory);
      expect(backing(memory.address)).toBe('');
      await settle();
      expect(protocol.decodeDmaUnmap(server.requests(Command.dmaUnmap)[0].payload)).toEqual({
        flags: 0,
        address: memory.iova,
        size: 8192,
      });
    });

    it('uses the ranges it is given', async () => {
      const { fn } = await connected([], {}, { iovaRanges: [{ start: 2 ** 38, last: 2 ** 38 + 8191 }] });
      expect(fn.allocateDma(8192)).toMatchObject({ iova: 2 ** 38, iovaHigh: 64, iovaLow: 0 });
      expect(() => fn.allocateDma(1)).toThrow(code('IOVA_EXHAUSTED'));
    });

    it('keeps to the page sizes and the number of mappings that the server takes', async () => {
      const capabilities = { max_msg_fds: 1, max_dma_maps: 2, pgsizes: 0x10000 };
      const { fn } = await connected([], { capabilities });
      const first = fn.allocateDma(1);
      expect(first).toMatchObject({ size: 0x10000, iova: 0x10000 });
      fn.allocateDma(1);
      expect(() => fn.allocateDma(1)).toThrow(code('DMA_EXHAUSTED'));
      fn.freeDma(first);
      expect(fn.allocateDma(1).iova).toBe(0x10000);
    });

    it('refuses a server whose pages are too large', async () => {
      const server = await fake([], { capabilities: { pgsizes: 2 ** 30 } });
      expect(() => open(server)).toThrow(code('PAGE_SIZE'));
      await server.closed();
    });

    it('sends no descriptor to a server that takes none', async () => {
      const { server, fn } = await connected([], { capabilities: { max_msg_fds: 0 } });
      fn.allocateDma(4096);
      expect(() => fn.setInterrupts([0])).toThrow(code('NO_DESCRIPTORS'));
      await settle();
      expect(server.requests(Command.dmaMap)[0].fds).toEqual([]);
    });

    it('changes nothing when the server refuses a mapping', async () => {
      const { fn } = await connected([
        { command: Command.dmaMap, nth: 1, reply: { flags: 0x21, error: 12, payload: words() } },
      ]);
      expect(() => fn.allocateDma(4096)).toThrow(
        expect.objectContaining({ code: 'DEVICE_REFUSED', message: expect.stringContaining('ENOMEM') }),
      );
      expect(fn.allocateDma(4096).iova).toBe(0x10000);
    });

    it('takes a DMA_UNMAP reply with or without the range', async () => {
      const { fn } = await connected([{ command: Command.dmaUnmap, nth: 1, reply: { payload: new Uint8Array(0) } }]);
      fn.freeDma(fn.allocateDma(4096));
      fn.freeDma(fn.allocateDma(4096));
      expect(fn.gone).toBe(false);
    });

    it.each<[string, Rule]>([
      ['a DMA_MAP reply with payload', { command: Command.dmaMap, nth: 2, reply: { payload: new Uint8Array(8) } }],
    ])('loses the device over %s', async (_, badRule) => {
      const { fn } = await connected([badRule]);
      losesTheDevice(fn, () => fn.allocateDma(4096), 'PROTOCOL');
    });

    it.each([
      ['of another range', words(24, 0, 0, 0, 4096, 0)],
      ['that is too short', words(24, 0)],
      ['that is too long', words(24, 0, 0x10000, 0, 4096, 0, 0)],
    ])('loses the device over a DMA_UNMAP reply %s', async (_, payload) => {
      const { fn } = await connected([{ command: Command.dmaUnmap, reply: { payload } }]);
      const memory = fn.allocateDma(4096);
      losesTheDevice(fn, () => fn.freeDma(memory), 'PROTOCOL');
      expect(backing(memory.address)).toBe('');
    });
  });

  describe('requests of the server', () => {
    const FIRST = 0x10000;
    const read = (address: number, count: number) => {
      const message = protocol.encodeDmaRead(address, count);
      message[0] = 0x77;
      return message;
    };

    it('are served while the client waits for a reply, inside of what is mapped', async () => {
      const before = [read(FIRST + 8, 4), protocol.encodeDmaWrite(FIRST + 4095, new Uint8Array([0x99]))];
      const { server, fn } = await connected([{ command: Command.regionRead, before }]);
      const memory = fn.allocateDma(4096);
      memory.u32[2] = 0x04030201;
      expect(fn.bar(0).read32(0)).toBe(0);
      expect(memory.u8[4095]).toBe(0x99);
      await settle();
      const [first, second] = server.replies();
      expect(first).toMatchObject({ id: 0x77, command: Command.dmaRead, flags: 1 });
      expect(protocol.decodeDmaAccess(first.payload, true)).toMatchObject({ address: FIRST + 8, count: 4 });
      expect([...first.payload.slice(16)]).toEqual([1, 2, 3, 4]);
      expect(second).toMatchObject({ command: Command.dmaWrite, flags: 1 });
      expect(protocol.decodeDmaAccess(second.payload, false)).toMatchObject({ address: FIRST + 4095, count: 1 });
    });

    it('are served from the event loop while nobody waits', async () => {
      const { server, fn } = await connected([{ command: Command.regionRead, after: [read(FIRST, 8)] }]);
      const memory = fn.allocateDma(4096);
      memory.u8.set([8, 7, 6, 5, 4, 3, 2, 1]);
      fn.bar(0).read32(0);
      for (let i = 0; i < 50 && server.replies().length === 0; i++) await settle();
      expect([...server.replies()[0].payload.slice(16)]).toEqual([8, 7, 6, 5, 4, 3, 2, 1]);
    });

    const EFAULT = 14;
    const EINVAL = 22;
    it.each([
      ['before the mapping', read(FIRST - 1, 4), EFAULT],
      ['across its end', read(FIRST + 4094, 4), EFAULT],
      ['far away', read(2 ** 50, 1), EFAULT],
      ['of more than a message may carry', read(FIRST, 2 ** 20 + 1), EINVAL],
      ['of 2^53 bytes', read(FIRST, 2 ** 53 - 1), EINVAL],
      ['to write across the end', protocol.encodeDmaWrite(FIRST + 4094, new Uint8Array(4).fill(0xff)), EFAULT],
      ['that are commands for a server', protocol.encodeRegionRead(0, 0, 4), 95],
      ['that nobody knows', protocol.request(200, 0), 95],
    ])('%s get an error and touch nothing', async (_, message, errno) => {
      const { server, fn } = await connected([{ command: Command.regionRead, before: [message] }]);
      const memory = fn.allocateDma(4096);
      expect(fn.bar(0).read32(0)).toBe(0);
      await settle();
      const [answer] = server.replies();
      expect(answer).toMatchObject({ flags: HeaderFlag.reply | HeaderFlag.error, error: errno });
      expect(answer.payload).toHaveLength(0);
      expect(memory.u8.every((byte) => byte === 0)).toBe(true);
      expect(fn.gone).toBe(false);
    });

    it('reach nothing that was freed', async () => {
      const { server, fn } = await connected([{ command: Command.regionRead, before: [read(FIRST, 4)] }]);
      fn.freeDma(fn.allocateDma(4096));
      fn.bar(0).read32(0);
      await settle();
      expect(server.replies()[0]).toMatchObject({ error: EFAULT });
    });

    it('get no reply when they want none', async () => {
      const message = protocol.encodeDmaWrite(FIRST, new Uint8Array([1, 2, 3]));
      message[8] = HeaderFlag.noReply;
      const { server, fn } = await connected([{ command: Command.regionRead, before: [message], replies: false }]);
      const memory = fn.allocateDma(4096);
      fn.bar(0).read32(0);
      fn.bar(0).write32(0, 1);
      expect([...memory.u8.subarray(0, 4)]).toEqual([1, 2, 3, 0]);
      await settle();
      expect(server.replies()).toEqual([]);
    });

    it.each([
      ['that want replies', 0],
      ['that want none', HeaderFlag.noReply],
    ])('%s cannot keep the client beyond its deadline', async (_, flag) => {
      const flood = protocol.encodeDmaWrite(FIRST, new Uint8Array(1));
      flood[8] = flag;
      const rule = { command: Command.regionRead, flood, replies: flag === 0 };
      const { fn } = await connected([rule], {}, { timeoutMs: IMPATIENT });
      losesTheDevice(fn, () => fn.bar(0).read32(0), 'TIMEOUT');
    });

    it.each([
      ['too short', protocol.request(Command.dmaRead, 8)],
      ['a write without its data', protocol.encodeDmaWrite(FIRST, new Uint8Array(8)).fill(9, 24, 25)],
    ])('lose the device when they are %s', async (_, message) => {
      const { fn } = await connected([{ command: Command.regionRead, before: [message], replies: false }]);
      losesTheDevice(fn, () => fn.bar(0).read32(0), 'PROTOCOL');
    });
  });

  describe('losing the device while nobody calls', () => {
    it.each<[string, Partial<Rule>, string]>([
      ['the server dies', { close: true }, 'DEVICE_GONE'],
      ['a reply comes to no request', { raw: protocol.reply(1, Command.regionRead) }, 'PROTOCOL'],
      ['garbage comes', { raw: new Uint8Array(100).fill(0xff) }, 'PROTOCOL'],
    ])('is noticed by the event loop when %s', async (_, action, expected) => {
      const { fn } = await connected([{ command: Command.regionWrite, ...action }], {}, { postWrites: true });
      const reason = new Promise<VfioError>((resolve) => fn.onGone?.(resolve));
      fn.bar(0).write32(0, 1);
      expect((await reason).code).toBe(expected);
      expect(fn.gone).toBe(true);
      expect(() => fn.config.read8(0)).toThrow(code('DEVICE_GONE'));
    });
  });

  describe('setInterrupts', () => {
    const decoded = (server: Fake) =>
      server.requests(Command.deviceSetIrqs).map((seen) => {
        const { flags, index, start, count } = protocol.decodeSetIrqs(seen.payload);
        return [flags, index, start, count, seen.fds.length];
      });

    it('sends all vectors, in as many messages as their descriptors take', async () => {
      const { server, fn } = await connected([], { capabilities: { max_msg_fds: 2 } });
      const eventfds = Array.from({ length: 5 }, () => EventFd.create());
      fn.setInterrupts(eventfds.map((eventfd) => eventfd.fd));
      await settle();
      expect(decoded(server)).toEqual([
        [0x24, 2, 0, 2, 2],
        [0x24, 2, 2, 2, 2],
        [0x24, 2, 4, 1, 1],
      ]);
      server.requests(Command.deviceSetIrqs).forEach((seen, i) => {
        const theirs = EventFd.adopt(libc.fcntl(seen.fds[0], libc.FcntlCommand.duplicate));
        theirs.signal();
        theirs.close();
        expect(eventfds[2 * i].drain()).toBe(1);
      });
      for (const eventfd of eventfds) eventfd.close();
    });

    it('disables all of them before it sets others, and when there are none', async () => {
      const { server, fn } = await connected();
      const eventfd = EventFd.create();
      fn.setInterrupts([]);
      fn.setInterrupts([eventfd.fd]);
      fn.setInterrupts([eventfd.fd, eventfd.fd]);
      fn.setInterrupts([]);
      fn.setInterrupts([]);
      await settle();
      expect(decoded(server)).toEqual([
        [0x24, 2, 0, 1, 1],
        [0x21, 2, 0, 0, 0],
        [0x24, 2, 0, 2, 2],
        [0x21, 2, 0, 0, 0],
      ]);
      eventfd.close();
    });

    it('refuses more vectors than there are', async () => {
      const { fn } = await connected();
      expect(() => fn.setInterrupts(new Array(7).fill(0))).toThrow(RangeError);
    });
  });

  describe('reset and close', () => {
    it('resets with the message for it where the server knows it', async () => {
      const { server, fn } = await connected();
      fn.reset();
      await settle();
      expect(server.requests(Command.deviceReset)).toHaveLength(1);
    });

    it('resets through PCI Express where it does not', async () => {
      const config = plainConfig();
      config[6] = 0x10;
      config[0x34] = 0x40;
      config.set([0x10, 0, 2, 0, 0, 0, 0, 0x10, 0x10, 0x28], 0x40);
      const { fn } = await connected([], { flags: 2, regions: [{ index: 7, flags: READ_WRITE, bytes: config }] });
      fn.reset();
      expect(fn.config.read16(0x48)).toBe(0xa810);
    });

    it('says so when there is no way to reset', async () => {
      const { fn } = await connected([], { flags: 2 });
      expect(() => fn.reset()).toThrow(code('NO_RESET'));
      fn.close();
    });

    it('closes with a reset first, then interrupts, then memory, and leaves nothing open', async () => {
      const before = openDescriptors();
      const { server, fn } = await connected();
      const eventfd = EventFd.create();
      fn.setInterrupts([eventfd.fd]);
      const memory = fn.allocateDma(4096);
      fn.close();
      fn.close();
      eventfd.close();
      await server.closed();
      expect(server.log.slice(-3).map((seen) => seen.command)).toEqual([
        Command.deviceReset,
        Command.deviceSetIrqs,
        Command.dmaUnmap,
      ]);
      expect(backing(memory.address)).toBe('');
      fn.freeDma(memory);
      expect(fn.gone).toBe(false);
      expect(() => fn.bar(0).read8(0)).toThrow(code('DEVICE_GONE'));
      expect(() => fn.allocateDma(1)).toThrow(code('DEVICE_GONE'));
      await server.stop();
      fakes.pop();
      expect(openDescriptors()).toBe(before);
    });

    it('closes in the time of one call when the server has stalled', async () => {
      const { fn } = await connected([{ command: Command.deviceReset, stall: true }], {}, { timeoutMs: 300 });
      fn.allocateDma(4096);
      fn.allocateDma(4096);
      const start = performance.now();
      fn.close();
      expect(performance.now() - start).toBeLessThan(800);
    });

    it('closes all the same when the server refuses everything', async () => {
      const refuse = { flags: 0x21, error: 5, payload: words() };
      const rules = [Command.deviceReset, Command.deviceSetIrqs, Command.dmaUnmap].map((command) => ({
        command,
        reply: refuse,
      }));
      const { server, fn } = await connected(rules);
      const memory = fn.allocateDma(4096);
      fn.close();
      expect(backing(memory.address)).toBe('');
      await server.closed();
    });
  });

  it.each([0, -1, Number.NaN])('refuses a deadline of %d ms', (timeoutMs) => {
    expect(() => openVfioUser('/nowhere', { timeoutMs })).toThrow(RangeError);
  });
}
