import { constants, existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { constants as os, tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device } from '../../src/device/index.ts';
import { EventFd } from '../../src/sys/eventfd.ts';
import { close, eventfd, ftruncate, memfdCreate } from '../../src/sys/libc.ts';
import { writeU32 } from '../../src/sys/little-endian.ts';
import * as protocol from '../../src/vfio/protocol.ts';
import { CommonCfgField as F } from '../../src/virtio/pci-layout.ts';
import { pause, RawClient, until, versionRequest } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

const { Command, Header, HeaderFlag } = protocol;
const CONFIG = 7;
const E = os.errno;

let folder = '';
let path = '';
let device: Device;
const warnings: string[] = [];
const clients: RawClient[] = [];

async function open(): Promise<RawClient> {
  const client = await RawClient.open(path);
  clients.push(client);
  return client;
}

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-session-'));
  path = join(folder, 'device.sock');
  warnings.length = 0;
  device = startDevice({ sockets: [path], onWarning: (text) => warnings.push(text) });
});

afterEach(() => {
  for (const client of clients.splice(0)) client.close();
  expect(device.internalErrors).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

describe('the socket of a device', () => {
  it('is only for its owner, and goes with the device', () => {
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(statSync(path).mode & constants.S_IFMT).toBe(constants.S_IFSOCK);
    device.close();
    expect(existsSync(path)).toBe(false);
  });

  it('is refused when another process listens there', () => {
    expect(() => startDevice({ sockets: [path] })).toThrow(expect.objectContaining({ code: 'SOCKET_IN_USE' }));
    expect(existsSync(path)).toBe(true);
  });

  it('replaces one that a dead process has left', async () => {
    const stale = join(folder, 'stale.sock');
    await new Promise<void>((resolve) => {
      const server = createServer();
      server.listen(stale, () => {
        // Closing the handle under the server leaves the path behind, as a killed process does.
        const link = join(folder, 'kept');
        void import('node:fs').then(({ linkSync, renameSync }) => {
          linkSync(stale, link);
          server.close(() => {
            renameSync(link, stale);
            resolve();
          });
        });
      });
    });
    expect(existsSync(stale)).toBe(true);
    const second = startDevice({ sockets: [stale] });
    const client = await RawClient.open(stale);
    client.close();
    second.close();
  });

  it('does not replace a file', () => {
    const file = join(folder, 'file');
    writeFileSync(file, 'precious');
    expect(() => startDevice({ sockets: [file] })).toThrow(expect.objectContaining({ code: 'SOCKET_IN_USE' }));
    expect(existsSync(file)).toBe(true);
  });

  it.each([
    ['no socket', { sockets: [] }],
    ['three sockets', { sockets: ['/a', '/b', '/c'] }],
    ['one socket twice', { sockets: ['/a', '/a'] }],
    ['a pair of one', { sockets: ['/a'], link: 'pair' }],
    ['a loopback of two', { sockets: ['/a', '/b'], link: 'loopback' }],
    ['an unknown link', { sockets: ['/a'], link: 'carrier-pigeon' }],
    ['a unix link without a path', { sockets: ['/a'], link: 'unix:' }],
    ['no queue pairs', { sockets: ['/a'], queuePairs: 0 }],
    ['too many queue pairs', { sockets: ['/a'], queuePairs: 63 }],
    ['a group address', { sockets: ['/a'], macs: ['01:00:00:00:00:00'] }],
    ['half an address', { sockets: ['/a'], macs: ['02:00:00'] }],
    ['an MTU of 67', { sockets: ['/a'], mtu: 67 }],
    ['memory for nothing', { sockets: ['/a'], memory: 0 }],
    ['memory of half a page', { sockets: ['/a'], memory: 2 ** 28 + 2048 }],
    ['more than 2 GiB', { sockets: ['/a'], memory: 2 ** 31 + 4096 }],
    ['an unknown fault', { sockets: ['/a'], faults: ['laziness'] }],
  ])('is not made with %s', (_, options) => {
    expect(() => startDevice(options)).toThrow(expect.objectContaining({ code: 'DEVICE_OPTION' }));
  });
});

describe('a session', () => {
  it('begins with VERSION and nothing else', async () => {
    const client = new RawClient(path);
    clients.push(client);
    client.post(protocol.encodeDeviceInfoRequest());
    expect(await client.isClosed()).toBe(true);
  });

  it('refuses another major version, and ends', async () => {
    const client = new RawClient(path);
    clients.push(client);
    expect((await client.request(versionRequest(1))).error).toBe(E.EINVAL);
    expect(await client.isClosed()).toBe(true);
  });

  it('answers VERSION with no more bytes than it was asked with', async () => {
    const client = new RawClient(path);
    clients.push(client);
    const request = protocol.request(Command.version, 4);
    const { payload, error } = await client.request(request);
    expect(error).toBe(0);
    expect(payload.length).toBe(4);
  });

  it('describes a PCI device with nine regions and five interrupt types', async () => {
    const client = await open();
    const { payload } = await client.request(protocol.encodeDeviceInfoRequest());
    expect(protocol.decodeDeviceInfo(payload)).toEqual({ flags: 3, regions: 9, irqs: 5 });
  });

  it.each([
    [0, 0x4000],
    [1, 0],
    [2, 0x2000],
    [3, 0],
    [6, 0],
    [7, 4096],
    [8, 0],
  ])('describes region %i', async (index, size) => {
    const client = await open();
    const { payload } = await client.request(protocol.encodeRegionInfoRequest(index, 4096));
    expect(protocol.decodeRegionInfo(payload)).toMatchObject({ index, size, areas: null, flags: size === 0 ? 0 : 3 });
  });

  it.each([0, 12, 32])('describes a region in 32 bytes to a client that asks with argsz %i', async (argsz) => {
    const client = await open();
    const { payload, error } = await client.request(protocol.encodeRegionInfoRequest(0, argsz));
    expect([payload.length, error]).toEqual([32, 0]);
  });

  it('has MSI-X and no other interrupts', async () => {
    const client = await open();
    const counts: number[] = [];
    for (let index = 0; index < 5; index++) {
      const { payload } = await client.request(protocol.encodeIrqInfoRequest(index));
      counts.push(protocol.decodeIrqInfo(payload).count);
    }
    expect(counts).toEqual([0, 0, 5, 0, 0]);
  });

  it.each([
    ['region info', protocol.encodeRegionInfoRequest(9, 32)],
    ['interrupt info', protocol.encodeIrqInfoRequest(5)],
    ['reads', protocol.encodeRegionRead(9, 0, 4)],
  ])('refuses %s of what does not exist', async (_, message) => {
    const client = await open();
    expect((await client.request(message)).error).toBe(E.EINVAL);
    expect((await client.request(protocol.encodeDeviceInfoRequest())).error).toBe(0);
  });

  it.each([0, 11, 12, 14, 15, 99, 65535])('answers command %i with an error', async (command) => {
    const client = await open();
    expect((await client.request(protocol.request(command, 16))).error).toBe(E.ENOSYS);
  });

  it('gives each notification register an eventfd, as many as the client takes, each time the same', async () => {
    const client = await open();
    const first = await client.request(protocol.encodeIoFdsRequest(0));
    const { areas } = protocol.decodeIoFds(first.payload);
    // A pair, the control queue, the administration queue; the client takes fewer descriptors than that.
    expect(areas.map(({ offset }) => offset)).toEqual([0x3000, 0x3004, 0x3008, 0x300c]);
    expect(first.descriptors.length).toBeGreaterThan(0);
    for (const { descriptor, flags, size } of areas) {
      expect(descriptor).toBeLessThan(first.descriptors.length);
      expect([flags, size]).toEqual([0, 0]);
    }
    expect(protocol.decodeIoFds((await client.request(protocol.encodeIoFdsRequest(0))).payload).areas).toEqual(areas);
    expect(protocol.decodeIoFds((await client.request(protocol.encodeIoFdsRequest(2))).payload).areas).toEqual([]);
    expect((await client.request(protocol.encodeIoFdsRequest(9))).error).toBe(E.EINVAL);
    // No room for the areas: their number is told, and no descriptor comes along.
    const short = protocol.encodeIoFdsRequest(0);
    writeU32(short, Header.length + protocol.RegionIoFds.argsz, 16);
    const answer = await client.request(short);
    expect(answer.payload.length).toBe(16);
    expect(answer.descriptors).toEqual([]);
  });

  it.each([
    ['past the end of configuration space', CONFIG, 4094, 4],
    ['at 2^63 of configuration space', CONFIG, 2 ** 63, 4],
    ['past the end of a BAR', 0, 0x3ffe, 4],
    ['beyond a BAR', 0, 0x4000, 4],
    ['of an absent BAR', 1, 0, 4],
    ['of the ROM', 6, 0, 4],
    ['of no bytes', 0, 0, 0],
    ['of 3 bytes', 0, 0, 3],
    ['of 16 bytes of a BAR', 0, 0, 16],
    ['that is misaligned', 0, 2, 4],
    ['of 2^32 - 1 bytes', CONFIG, 0, 0xffffffff],
  ])('refuses an access %s', async (_, region, offset, count) => {
    const client = await open();
    expect((await client.request(protocol.encodeRegionRead(region, offset, count))).error).toBe(E.EINVAL);
    if (count > 4096) return;
    const write = protocol.encodeRegionWrite(region, offset, new Uint8Array(count));
    expect((await client.request(write)).error).toBe(E.EINVAL);
  });

  it('answers BAR reads with ones while memory space is disabled, and ignores writes', async () => {
    const client = await open();
    expect(await client.read(0, F.numQueues, 2)).toBe(0xffff);
    await client.write(0, F.deviceStatus, 1, 1);
    await client.write(CONFIG, 4, 2, 2);
    expect(await client.read(0, F.numQueues, 2)).toBe(3);
    expect(await client.read(0, F.deviceStatus, 1)).toBe(0);
  });

  it('splits an access of 8 bytes into two of 4', async () => {
    const client = await open();
    await client.write(CONFIG, 4, 2, 2);
    await client.write(0, F.queueSelect, 2, 0);
    await client.write(0, F.queueDesc, 8, 0x1122334455660);
    expect(await client.read(0, F.queueDesc, 4)).toBe(0x34455660);
    expect(await client.read(0, F.queueDesc, 8)).toBe(0x1122334455660);
  });

  it('sends no reply when none is wanted, not even an error', async () => {
    const client = await open();
    client.post(protocol.encodeRegionWrite(CONFIG, 4, Uint8Array.of(2, 0), HeaderFlag.noReply));
    client.post(protocol.encodeRegionWrite(42, 4, Uint8Array.of(2, 0), HeaderFlag.noReply));
    expect(await client.read(CONFIG, 4, 2)).toBe(2);
  });

  it('puts a message together from single bytes', async () => {
    const client = await open();
    const message = protocol.encodeRegionRead(CONFIG, 0, 4);
    for (let i = 0; i < message.length; i++) {
      client.socket.send(message.subarray(i, i + 1), performance.now() + 1000);
      await pause(0);
    }
    const reply = await client.receive();
    expect(protocol.decodeRegionAccess(reply?.payload ?? new Uint8Array(0), true).data[0]).toBe(0xf4);
  });

  it('answers many messages that came at once, in order', async () => {
    const client = await open();
    const ids = Array.from({ length: 200 }, () => client.post(protocol.encodeRegionRead(CONFIG, 0, 2)));
    const answered: number[] = [];
    for (let i = 0; i < ids.length; i++) answered.push((await client.receive())?.id ?? -1);
    expect(answered).toEqual(ids);
  });

  it('waits for nobody who does not take his replies, and answers all when he does', async () => {
    const client = await open();
    const request = protocol.encodeRegionRead(CONFIG, 0, 256);
    let asked = 0;
    let longest = 0;
    // Until neither side takes any more.
    for (let turns = 0; turns < 5; turns++) {
      for (; client.socket.trySend(request, 0) > 0; turns = 0) asked++;
      const before = performance.now();
      await pause(0);
      longest = Math.max(longest, performance.now() - before);
    }
    expect(asked).toBeGreaterThan(100);
    expect(longest).toBeLessThan(1500);
    for (let i = 0; i < asked; i++) expect((await client.receive())?.error).toBe(0);
    expect((await client.request(protocol.encodeDeviceInfoRequest())).error).toBe(0);
    expect(warnings).toEqual([]);
  });

  it.each<[string, () => Uint8Array]>([
    ['a size below the header', () => sized(8)],
    ['a size of 4 GiB', () => sized(0xffffffff)],
    ['a truncated DMA_MAP', () => protocol.request(Command.dmaMap, 31)],
    ['a truncated REGION_WRITE', () => protocol.request(Command.regionWrite, 10)],
    [
      'a REGION_WRITE whose count is not its data',
      () => {
        const message = protocol.encodeRegionWrite(CONFIG, 4, new Uint8Array(4));
        writeU32(message, Header.length + 12, 400);
        return message;
      },
    ],
    ['SET_IRQS with two actions', () => setIrqs(1 | 32 | 8, 0, 1)],
    ['a reply to nothing', () => protocol.reply(7, Command.version)],
  ])('ends with %s', async (_, message) => {
    const client = await open();
    client.post(message());
    expect(await client.isClosed()).toBe(true);
    await until('the next session', () => warnings.length > 0);
    const next = await open();
    expect((await next.request(protocol.encodeDeviceInfoRequest())).error).toBe(0);
  });

  it('survives any bytes', async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 0, max: 16 }), fc.uint8Array({ maxLength: 200 }), async (command, bytes) => {
        const client = await RawClient.open(path);
        const message = protocol.request(command, bytes.length);
        message.set(bytes, Header.length);
        client.post(message);
        await client.receive();
        client.close();
      }),
      { numRuns: 100 },
    );
    expect((await (await open()).request(protocol.encodeDeviceInfoRequest())).error).toBe(0);
  });

  it('is told of a few of many sessions that ended badly', async () => {
    for (let i = 0; i < 15; i++) {
      const client = await open();
      client.post(protocol.reply(7, Command.version));
      expect(await client.isClosed()).toBe(true);
    }
    expect((await (await open()).request(protocol.encodeDeviceInfoRequest())).error).toBe(0);
    expect(warnings).toHaveLength(10);
  });

  it('serves the next client after the first has left, with a function that was reset', async () => {
    const first = await open();
    await first.write(CONFIG, 4, 2, 6);
    await first.write(0, F.deviceStatus, 1, 3);
    const second = new RawClient(path);
    clients.push(second);
    second.post(versionRequest());
    await pause(30);
    first.close();
    expect((await second.receive())?.error).toBe(0);
    expect(await second.read(CONFIG, 4, 2)).toBe(0);
    await second.write(CONFIG, 4, 2, 2);
    expect(await second.read(0, F.deviceStatus, 1)).toBe(0);
  });

  it('resets the function with DEVICE_RESET, and with a function-level reset', async () => {
    const client = await open();
    for (const reset of [
      () => client.request(protocol.request(Command.deviceReset, 0)),
      () => client.write(CONFIG, 0xa4 + 8, 2, 0x8000),
    ]) {
      await client.write(CONFIG, 4, 2, 6);
      await client.write(0, F.deviceStatus, 1, 3);
      await reset();
      expect(await client.read(CONFIG, 4, 2)).toBe(0);
      await client.write(CONFIG, 4, 2, 2);
      expect(await client.read(0, F.deviceStatus, 1)).toBe(0);
    }
  });
});

describe('DMA messages', () => {
  const memory = (size: number) => {
    const fd = memfdCreate('dma');
    ftruncate(fd, size);
    return fd;
  };

  it('map and unmap, whatever an unmap covers', async () => {
    const client = await open();
    const fd = memory(0x10000);
    for (let i = 0; i < 4; i++) expect(await client.dmaMap(i * 0x10000, 0x10000, fd)).toBe(0);
    expect(await client.dmaMap(0x8000, 0x10000, fd)).toBe(E.EEXIST);
    expect(await client.dmaUnmap(0x100000, 0x1000)).toBe(0);
    expect(await client.dmaUnmap(0, 0x28000)).toBe(0);
    expect(await client.dmaMap(0, 0x10000, fd)).toBe(0);
    expect(await client.dmaUnmap(0, 0, 2)).toBe(0);
    expect(await client.dmaMap(0x30000, 0x10000, fd)).toBe(0);
    expect(await client.dmaUnmap(0, 2 ** 64 - 4096)).toBe(0);
    expect(await client.dmaMap(0x30000, 0x10000, fd)).toBe(0);
    close(fd);
  });

  it('accept memory without a descriptor, and refuse more than one', async () => {
    const client = await open();
    const fd = memory(0x1000);
    expect(await client.dmaMap(0, 0x1000, null)).toBe(0);
    const message = protocol.encodeDmaMap({ flags: 3, offset: 0, address: 0, size: 0x1000 });
    expect((await client.request(message, [fd, fd])).error).toBe(E.EINVAL);
    expect(await client.dmaMap(0, 0x1000, fd)).toBe(0);
    close(fd);
  });

  it.each([
    ['a file that is too short', 0, 0x2000, 0],
    ['half a page', 0, 0x800, 0],
    ['an odd offset', 0, 0x1000, 1],
    ['an odd address', 1, 0x1000, 0],
  ])('refuse %s', async (_, iova, size, offset) => {
    const client = await open();
    const fd = memory(0x1000);
    expect(await client.dmaMap(iova, size, fd, offset)).toBe(E.EINVAL);
    close(fd);
  });

  it('refuse a descriptor that cannot be mapped', async () => {
    const client = await open();
    const fd = eventfd();
    expect(await client.dmaMap(0, 0x1000, fd)).toBe(E.EINVAL);
    close(fd);
  });

  it('leave no descriptor open, neither in a session nor after it', async () => {
    const descriptors = () => readdirSync('/proc/self/fd').length;
    const fd = memory(0x100000);
    const event = eventfd();
    // The first session opens what is kept for ever (scratch memory is not a descriptor, but the event loop's is).
    const first = await open();
    const during = descriptors();
    first.close();
    // Its socket, and the server's.
    await until('the end of the first session', () => descriptors() <= during - 2);
    const before = descriptors();
    const client = await RawClient.open(path);
    for (let i = 0; i < 100; i++) await client.dmaMap(i * 0x1000, 0x1000, fd, i * 0x1000);
    for (let i = 0; i < 100; i++) await client.dmaMap(i * 0x1000, 0x1000, fd, i * 0x1000);
    await client.request(setIrqs(4 | 32, 0, 3), [event, event, event]);
    await client.request(setIrqs(4 | 32, 0, 3), [event, event, event]);
    await client.request(setIrqs(4 | 32, 0, 5), [event, fd, event, fd, event]);
    await client.request(protocol.request(99, 0), [fd, fd]);
    // The client's socket, the server's, one file, and the eventfds that were taken.
    expect(descriptors()).toBeLessThanOrEqual(before + 3 + 3);
    client.close();
    await until('the end of the second session', () => descriptors() <= before);
    expect(descriptors()).toBe(before);
    close(fd);
    close(event);
  });
});

describe('interrupt messages', () => {
  const counters: EventFd[] = [];
  const make = (n: number) => {
    const made = Array.from({ length: n }, () => EventFd.create());
    counters.push(...made);
    return made;
  };
  afterEach(() => {
    for (const counter of counters.splice(0)) counter.close();
  });

  it('connect vectors, fire them by hand, mask them, and disconnect them', async () => {
    const client = await open();
    const [a, b] = make(2);
    expect((await client.request(setIrqs(4 | 32, 1, 2), [a.fd, b.fd])).error).toBe(0);
    expect((await client.read(CONFIG, 0x98 + 2, 2)) & 0x8000).toBe(0x8000);
    await client.request(setIrqs(1 | 32, 1, 2));
    expect([a.drain(), b.drain()]).toEqual([1, 1]);
    await client.request(setIrqs(2 | 32, 1, 2, Uint8Array.of(0, 1)));
    expect([a.drain(), b.drain()]).toEqual([0, 1]);
    await client.request(setIrqs(1 | 8, 1, 1));
    await client.request(setIrqs(1 | 32, 1, 2));
    expect([a.drain(), b.drain()]).toEqual([0, 1]);
    await client.request(setIrqs(1 | 16, 1, 1));
    expect([a.drain(), b.drain()]).toEqual([1, 0]);
    // One vector with an eventfd and no descriptor: disconnected.
    await client.request(setIrqs(4 | 32, 1, 1));
    await client.request(setIrqs(1 | 32, 1, 2));
    expect([a.drain(), b.drain()]).toEqual([0, 1]);
    await client.request(setIrqs(1 | 32, 0, 0));
    expect((await client.read(CONFIG, 0x98 + 2, 2)) & 0x8000).toBe(0);
    await client.request(setIrqs(1 | 32, 1, 2));
    expect([a.drain(), b.drain()]).toEqual([0, 0]);
  });

  it.each([
    ['vectors beyond the last', 4 | 32, 4, 2, 2],
    ['a start of 2^32 - 1', 1 | 32, 0xffffffff, 1, 0],
    ['a count of 2^32 - 1', 1 | 32, 0, 0xffffffff, 0],
    ['fewer eventfds than vectors', 4 | 32, 0, 3, 2],
    ['eventfds to mask with', 4 | 8, 0, 1, 1],
  ])('refuse %s', async (_, flags, start, count, descriptors) => {
    const client = await open();
    const fds = make(descriptors).map(({ fd }) => fd);
    expect((await client.request(setIrqs(flags, start, count), fds)).error).toBe(E.EINVAL);
  });

  it('refuse a descriptor that is no eventfd', async () => {
    const client = await open();
    const fd = memfdCreate('x');
    expect((await client.request(setIrqs(4 | 32, 0, 1), [fd])).error).toBe(E.EINVAL);
    close(fd);
  });
});

/** A message whose header claims `size` bytes. */
function sized(size: number): Uint8Array {
  const message = protocol.request(Command.deviceGetInfo, 16);
  writeU32(message, Header.size, size);
  return message;
}

function setIrqs(flags: number, start: number, count: number, data = new Uint8Array(0)): Uint8Array {
  return protocol.encodeSetIrqs({ flags, index: protocol.PciIrq.msix, start, count, data });
}
