/**
 * `vipsec device --link tap:NAME` against the kernel, in a network namespace of its own. The kernel is the judge: it answers ARP and ping
 * only where it finds addresses and checksums right, and its sockets get back what they sent.
 */
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Nic, NicOptions } from '../../src/index.ts';
import { checksum } from '../../src/packet/checksum.ts';
import { Namespace } from './namespace.ts';
import { atEnd, cleanUp, type DeviceProcess, directory, open, receive, send, spawnDevice, until } from './support.ts';
import { type Outcome, vipsec } from './vipsec.ts';

const program = fileURLToPath(new URL('../../dist/tools/vipsec.js', import.meta.url));
const datagrams = fileURLToPath(new URL('./datagrams.mjs', import.meta.url));

const TAP = 'tap0';
const KERNEL = { mac: [2, 0, 0, 0, 0, 0xa], ip: [10, 9, 0, 1] };
const OURS = { mac: [2, 0, 0, 0, 0, 0xb], ip: [10, 9, 0, 2] };
const dotted = ({ ip }: { ip: number[] }): string => ip.join('.');
const colons = ({ mac }: { mac: number[] }): string => mac.map((byte) => byte.toString(16).padStart(2, '0')).join(':');

const BROADCAST = [255, 255, 255, 255, 255, 255];
const ArpOperation = { request: 1, reply: 2 } as const;
const IcmpType = { reply: 0, request: 8 } as const;

let namespace: Namespace;

beforeEach(async () => {
  namespace = await Namespace.open();
  atEnd(() => namespace.close());
});

afterEach(cleanUp);

/** A persistent TAP with the kernel's address, up. */
async function addTap(mtu = 1500): Promise<void> {
  await namespace.must('ip', 'tuntap', 'add', 'dev', TAP, 'mode', 'tap');
  await namespace.must('ip', 'link', 'set', 'dev', TAP, 'address', colons(KERNEL), 'mtu', String(mtu), 'up');
  await namespace.must('ip', 'addr', 'add', `${dotted(KERNEL)}/24`, 'dev', TAP);
}

function startDevice(name = TAP): Promise<DeviceProcess> {
  return spawnDevice({ link: `tap:${name}`, mac: colons(OURS), enter: namespace.enter });
}

/** A NIC on a device that is attached to the TAP. */
async function attached(mtu?: number, options?: NicOptions): Promise<{ nic: Nic; device: DeviceProcess }> {
  await addTap(mtu);
  const device = await startDevice();
  return { nic: await open(device.addresses[0], options), device };
}

interface LinkStatistics {
  readonly up: boolean;
  readonly sent: number;
  readonly received: number;
  readonly dropped: number;
}

/** The counters of the link, as the device prints them on SIGUSR1. */
async function linkOf({ process }: DeviceProcess): Promise<LinkStatistics> {
  const { stderr } = process;
  if (stderr === null) throw new Error('no stderr');
  let text = '';
  const add = (more: string) => {
    text += more;
  };
  const lines = () => text.split('\n').filter((line, i, all) => i < all.length - 1 && line.startsWith('['));
  stderr.on('data', add);
  process.kill('SIGUSR1');
  await until(
    () => lines().length > 0,
    () => `no statistics: ${text}`,
  );
  stderr.off('data', add);
  const [{ link }]: { link: LinkStatistics }[] = JSON.parse(lines()[0]);
  return link;
}

/** Waits until the link's counters are as `holds` wants them. */
async function counted(device: DeviceProcess, holds: (link: LinkStatistics) => boolean): Promise<LinkStatistics> {
  const deadline = performance.now() + 30_000;
  for (;;) {
    const link = await linkOf(device);
    if (holds(link)) return link;
    if (performance.now() > deadline) throw new Error(`the link has counted ${JSON.stringify(link)}`);
  }
}

function arp(operation: number, to: number[], target: number[]): Buffer {
  const { mac, ip } = operation === ArpOperation.reply ? KERNEL : OURS;
  const peer = operation === ArpOperation.reply ? OURS : KERNEL;
  return Buffer.from([...to, ...mac, 8, 6, 0, 1, 8, 0, 6, 4, 0, operation, ...mac, ...ip, ...target, ...peer.ip]);
}

/** An ICMP echo request to the kernel. */
function ping(sequence: number, payload: number): Buffer {
  const frame = Buffer.alloc(14 + 20 + 8 + payload);
  frame.set([...KERNEL.mac, ...OURS.mac, 8, 0, 0x45]);
  frame.writeUInt16BE(frame.length - 14, 16);
  frame.set([64, 1], 22);
  frame.set([...OURS.ip, ...KERNEL.ip], 26);
  frame.writeUInt16BE(checksum(frame, 14, 20), 24);
  frame[34] = IcmpType.request;
  frame.writeUInt16BE(0x5a5a, 38);
  frame.writeUInt16BE(sequence, 40);
  for (let i = 0; i < payload; i++) frame[42 + i] = sequence + i;
  frame.writeUInt16BE(checksum(frame, 34, frame.length - 34), 36);
  return frame;
}

/** The answer to `request`, but for the header fields that are the kernel's to choose, taken from `reply`: identification, flags, checksum. */
function pong(request: Buffer, reply: Buffer): Buffer {
  const frame = Buffer.from(request);
  frame.set([...OURS.mac, ...KERNEL.mac]);
  frame.set(reply.subarray(18, 22), 18);
  frame.set([0, 0], 24);
  frame.set([...KERNEL.ip, ...OURS.ip], 26);
  frame.writeUInt16BE(checksum(frame, 14, 20), 24);
  frame.set([IcmpType.reply, 0, 0, 0], 34);
  frame.writeUInt16BE(checksum(frame, 34, frame.length - 34), 36);
  return frame;
}

const typeOf = (frame: Buffer): number => frame.readUInt16BE(12);
const isArp = (frame: Buffer): boolean => typeOf(frame) === 0x0806;
const isIp = (frame: Buffer): boolean => typeOf(frame) === 0x0800;

/** Takes frames until `count` of them are such as `isWanted` says; only those. The kernel says more than it is asked (IPv6). */
async function take(nic: Nic, count: number, isWanted: (frame: Buffer) => boolean): Promise<Buffer[]> {
  const wanted: Buffer[] = [];
  const deadline = performance.now() + 30_000;
  while (wanted.length < count && performance.now() < deadline) {
    for (const { frame } of await receive(nic, 0, 1)) if (isWanted(frame)) wanted.push(frame);
  }
  return wanted;
}

/** Does for the kernel's datagrams what a host at our address would, until `until` is settled: answers ARP, echoes UDP. */
async function beEcho<T>(nic: Nic, until: Promise<T>): Promise<T> {
  let over = false;
  const end = until.finally(() => {
    over = true;
  });
  while (!over) {
    const answers = (await receive(nic, 0, 1)).flatMap(({ frame }) => answerTo(frame));
    if (answers.length > 0) await send(nic, answers, null);
  }
  return end;
}

function answerTo(frame: Buffer): Buffer[] {
  if (isArp(frame)) return frame[21] === ArpOperation.request ? [ourReply()] : [];
  if (!isIp(frame) || frame[23] !== 17) return [];
  // Addresses and ports in turn: no checksum changes.
  const answer = Buffer.from(frame);
  for (const [a, b, length] of [
    [0, 6, 6],
    [26, 30, 4],
    [34, 36, 2],
  ]) {
    answer.set(frame.subarray(a, a + length), b);
    answer.set(frame.subarray(b, b + length), a);
  }
  return [answer];
}

const ourReply = (): Buffer =>
  Buffer.from([
    ...KERNEL.mac,
    ...OURS.mac,
    8,
    6,
    0,
    1,
    8,
    0,
    6,
    4,
    0,
    ArpOperation.reply,
    ...OURS.mac,
    ...OURS.ip,
    ...KERNEL.mac,
    ...KERNEL.ip,
  ]);

const NOBODY = [0, 0, 0, 0, 0, 0];

describe('the tap link', () => {
  it('carries frames both ways byte for byte: the kernel answers ARP and pings of all sizes', async () => {
    const { nic, device } = await attached();
    await send(nic, [arp(ArpOperation.request, BROADCAST, NOBODY)], null);
    expect(await take(nic, 1, isArp)).toEqual([arp(ArpOperation.reply, OURS.mac, OURS.mac)]);
    const requests = Array.from({ length: 300 }, (_, i) => ping(i, (i * 5) % 1473));
    requests.push(ping(300, 1472));
    const replies: Buffer[] = [];
    // Less at once than the interface's queue holds.
    for (let i = 0; i < requests.length; i += 100) {
      const some = requests.slice(i, i + 100);
      await send(nic, some, null);
      replies.push(...(await take(nic, some.length, (frame) => isIp(frame) && frame[23] === 1)));
    }
    expect(replies.length).toBe(requests.length);
    expect(replies).toEqual(requests.map((request, i) => pong(request, replies[i])));
    expect(await linkOf(device)).toMatchObject({ up: true, sent: 302, dropped: 0 });
  });

  it('gives what sockets of the kernel send to the driver, and what it answers back to them', async () => {
    const { nic } = await attached();
    const echoed = namespace.must(process.execPath, datagrams, dotted(OURS), '0', '320', '1472', 'echo');
    expect(await beEcho(nic, echoed)).toBe('320\n');
  });

  it('leaves frames in the queue of the kernel while the driver takes none, and loses none of them', async () => {
    const { nic, device } = await attached(1500, { queueSize: 64 });
    await namespace.must('ip', 'neigh', 'add', dotted(OURS), 'lladdr', colons(OURS), 'dev', TAP);
    await namespace.must('ip', 'link', 'set', 'dev', TAP, 'txqueuelen', '1000');
    // Half of them are no more than the device holds itself, all of them are more; the other half is no more than the kernel's queue holds.
    const half = 900;
    await namespace.must(process.execPath, datagrams, dotted(OURS), '0', String(half), '100');
    await counted(device, ({ received }) => received >= half);
    await namespace.must(process.execPath, datagrams, dotted(OURS), String(half), String(half), '100');
    const numbers = (await take(nic, 2 * half, isIp)).map((frame) => frame.readUInt32BE(42));
    expect(numbers).toEqual(Array.from({ length: 2 * half }, (_, i) => i));
    expect((await linkOf(device)).dropped).toBe(0);
  });

  it('leaves out frames that are longer than the device takes', async () => {
    const { nic, device } = await attached(4000);
    await namespace.must('ip', 'neigh', 'add', dotted(OURS), 'lladdr', colons(OURS), 'dev', TAP);
    // All of them wait when the device looks: more than it takes at once.
    device.process.kill('SIGSTOP');
    await namespace.must(process.execPath, datagrams, dotted(OURS), '0', '70', '3000');
    device.process.kill('SIGCONT');
    await counted(device, ({ dropped }) => dropped === 70);
    await send(nic, [ping(1, 50)], null);
    expect(await take(nic, 1, isIp)).toHaveLength(1);
  });

  it('drops and counts what is sent while the interface is down, and goes on when it is up again', async () => {
    const { nic, device } = await attached();
    await namespace.must('ip', 'link', 'set', 'dev', TAP, 'down');
    await send(nic, [ping(1, 50), ping(2, 50)], null);
    await counted(device, ({ dropped, sent }) => dropped === 2 && sent === 0);
    await namespace.must('ip', 'link', 'set', 'dev', TAP, 'up');
    await send(nic, [arp(ArpOperation.request, BROADCAST, NOBODY)], null);
    expect(await take(nic, 1, isArp)).toHaveLength(1);
  });

  it('is down, and the device lives, when the interface is deleted', async () => {
    const { nic, device } = await attached();
    let said = '';
    device.process.stderr?.on('data', (text: string) => {
      said += text;
    });
    expect(nic.link.up).toBe(true);
    await namespace.must('ip', 'link', 'delete', 'dev', TAP);
    await until(
      () => !nic.link.up,
      () => 'the link is still up',
    );
    await send(nic, [ping(1, 50)], null);
    await counted(device, ({ dropped }) => dropped === 1);
    expect(said.match(/the TAP interface tap0 is gone/g)).toHaveLength(1);
    expect(await stopped(device)).toBe(0);
  });

  it('lets go of the interface when the device ends: one that it made goes, one that was there can be had again', async () => {
    await addTap();
    for (let round = 0; round < 2; round++) {
      const device = await startDevice();
      expect((await start('--link', `tap:${TAP}`)).stderr).toMatch(/^vipsec: error: .*tap0.*\(EBUSY\).*\nhint: /);
      expect(await stopped(device)).toBe(0);
    }
    const device = await startDevice('tap1');
    const [shown] = JSON.parse(await namespace.must('ip', '-json', 'addr', 'show', 'dev', 'tap1'));
    // Neither brought up nor given an address.
    expect(shown).toMatchObject({ operstate: 'DOWN', addr_info: [] });
    expect(shown.flags).not.toContain('UP');
    expect(await stopped(device)).toBe(0);
    expect((await namespace.run('ip', 'link', 'show', 'dev', 'tap1')).code).not.toBe(0);
  });

  it('closes its descriptor with the device, and when the device cannot start', async () => {
    const run = [process.execPath, '--input-type=module', '-e', inOneProcess, directory()];
    expect(JSON.parse(await namespace.must(...run))).toEqual([1, 0, 'ENOENT', 0]);
  });
});

/** Prints the TAP descriptors of a process while a device runs in it, after its end, and after one that could not start. */
const inOneProcess = `
  import { readdirSync, readlinkSync } from 'node:fs';
  import { startDevice } from ${JSON.stringify(fileURLToPath(new URL('../../dist/src/device/index.js', import.meta.url)))};
  const taps = () => readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync('/proc/self/fd/' + fd) === '/dev/net/tun';
    } catch {
      return false; // That of the directory itself.
    }
  }).length;
  const counts = [];
  const [folder] = process.argv.slice(1);
  const device = startDevice({ sockets: [folder + '/device.sock'], link: 'tap:tap2', memory: 2 ** 28 });
  counts.push(taps());
  device.close();
  counts.push(taps());
  try {
    startDevice({ sockets: [folder + '/missing/device.sock'], link: 'tap:tap2', memory: 2 ** 28 });
  } catch (error) {
    counts.push(error.code, taps());
  }
  console.log(JSON.stringify(counts));
`;

/** Ends a device as a user would; its exit code. */
async function stopped({ process }: DeviceProcess): Promise<number | null> {
  const end = once(process, 'exit');
  process.kill('SIGTERM');
  const [code] = await end;
  return code;
}

/** Runs a device that must not start, in the namespace. */
function start(...args: string[]): Promise<Outcome> {
  return startWith([], ...args);
}

function startWith(prefix: readonly string[], ...args: string[]): Promise<Outcome> {
  const socket = `${directory()}/device.sock`;
  return namespace.run(...prefix, 'timeout', '50', process.execPath, program, 'device', '--socket', socket, ...args);
}

describe('vipsec device with a tap that is not to be had', () => {
  it.each([
    ['no name', 'tap:'],
    ['a name of 16 characters', 'tap:abcdefghijklmnop'],
    ['a slash', 'tap:a/b'],
    ['a pattern', 'tap:tap%d'],
    ['white space', 'tap:a b'],
    ['dots', 'tap:..'],
  ])('ends with 2 and a hint: %s', async (_, link) => {
    const { code, stderr } = await vipsec(['device', '--socket', `${directory()}/device.sock`, '--link', link]);
    expect(stderr).toMatch(/^vipsec: error: .*name of a network interface.*\[DEVICE_OPTION\]\nhint: .*tap:NAME/);
    expect(code).toBe(2);
  });

  it('says that it needs a right, and what to do instead', async () => {
    const { code, stderr } = await startWith(
      ['setpriv', '--bounding-set=-all', '--inh-caps=-all'],
      '--link',
      'tap:tap7',
    );
    expect(stderr).toMatch(
      /^vipsec: error: .*tap7.*\(EPERM\).*\[LINK_FAILED\]\nhint: .*CAP_NET_ADMIN.*ip tuntap add dev tap7/,
    );
    expect(code).toBe(1);
  });

  it('says that an interface is no TAP', async () => {
    const { code, stderr } = await start('--link', 'tap:lo');
    expect(stderr).toMatch(/^vipsec: error: .*lo.*\(EINVAL\).*\[LINK_FAILED\]\nhint: .*not as a tap/);
    expect(code).toBe(1);
  });

  it('says that there is no /dev/net/tun', async () => {
    const hide = ['unshare', '--mount', 'sh', '-c', 'mount -t tmpfs none /dev/net && exec "$@"', 'sh'];
    const { code, stderr } = await startWith(hide, '--link', `tap:${TAP}`);
    expect(stderr).toMatch(/^vipsec: error: .*\(ENOENT\).*\[LINK_FAILED\]\nhint: .*\/dev\/net\/tun.*module tun/);
    expect(code).toBe(1);
  });
});
