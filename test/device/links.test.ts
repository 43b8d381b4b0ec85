import { appendFileSync, existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Device } from '../../src/device/index.ts';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';
import { LinkType } from '../../src/packet/fields.ts';
import { PollEvent, poll } from '../../src/sys/libc.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { NetDriver, udpFrame } from './helpers/net-driver.ts';
import { pause, until } from './helpers/raw-client.ts';
import { startDevice } from './helpers/start.ts';

let folder = '';
let path = '';
let device: Device;
const closers: (() => void)[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-links-'));
  path = join(folder, 'device.sock');
});

afterEach(async () => {
  for (const each of closers.splice(0)) each();
  await pause(20);
  expect(device.internalErrors).toBe(0);
  expect(device.packetsInUse).toBe(0);
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

async function open(options: Parameters<typeof NetDriver.open>[1] = {}): Promise<NetDriver> {
  const net = await NetDriver.open(path, options);
  closers.push(() => net.close());
  await net.fill();
  return net;
}

/** QEMU's framing from the other side. */
class Peer {
  readonly frames: Uint8Array[] = [];
  closed = false;
  readonly socket: Socket;
  #bytes = Buffer.alloc(0);

  constructor(socket: Socket) {
    this.socket = socket;
    closers.push(() => socket.destroy());
    socket.on('data', (data) => {
      this.#bytes = Buffer.concat([this.#bytes, data]);
      while (this.#bytes.length >= 4 && this.#bytes.length >= 4 + this.#bytes.readUInt32BE(0)) {
        const size = this.#bytes.readUInt32BE(0);
        this.frames.push(new Uint8Array(this.#bytes.subarray(4, 4 + size)));
        this.#bytes = this.#bytes.subarray(4 + size);
      }
    });
    socket.on('error', () => {});
    socket.on('close', () => {
      this.closed = true;
    });
  }

  static async connect(to: string): Promise<Peer> {
    const socket = connect(to);
    await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject));
    return new Peer(socket);
  }

  send(...frames: Uint8Array[]): void {
    const parts = frames.flatMap((frame) => {
      const prefix = Buffer.alloc(4);
      prefix.writeUInt32BE(frame.length);
      return [prefix, frame];
    });
    this.socket.write(Buffer.concat(parts));
  }
}

const link = () => {
  const { link: counters } = device.functions[0].statistics();
  return counters as { up: boolean; sent: number; received: number; dropped: number };
};
const linkStatus = (net: NetDriver) => net.driver.read(0x2006, 2);

describe('the unix link', () => {
  const wire = () => join(folder, 'wire');

  it('accepts a peer before any driver, and outlives drivers and peers', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    expect(statSync(wire()).mode & 0o777).toBe(0o600);
    const first = await Peer.connect(wire());
    first.send(udpFrame(60));
    for (let round = 0; round < 2; round++) {
      const net = await open();
      first.send(udpFrame(100 + round));
      expect((await net.receive()).frame).toEqual(udpFrame(100 + round));
      await net.send(udpFrame(200 + round));
      await until('the frame', () => first.frames.length === round + 1);
      expect(first.frames[round]).toEqual(udpFrame(200 + round));
      net.close();
      closers.pop();
      await pause(20);
    }
    first.socket.destroy();
    await until('the peer to be gone', () => link().up === false);
    const second = await Peer.connect(wire());
    const net = await open();
    second.send(udpFrame(77));
    expect((await net.receive()).frame).toEqual(udpFrame(77));
    device.close();
    expect(existsSync(wire())).toBe(false);
  });

  it('tells the driver when a peer comes and goes', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const net = await open({ features: FeatureSet.of(Feature.VERSION_1, Feature.STATUS), vectors: true });
    expect(await linkStatus(net)).toBe(0);
    const interrupted = () => poll(net.driver.eventfds[0], PollEvent.in, 0) !== 0;
    expect(interrupted()).toBe(false);
    const peer = await Peer.connect(wire());
    await until('the interrupt', interrupted);
    expect(await linkStatus(net)).toBe(1);
    peer.socket.destroy();
    await until('the link to go down', () => link().up === false);
    expect(await linkStatus(net)).toBe(0);
  });

  it('finds frames in a stream that comes in any pieces', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const net = await open();
    const peer = await Peer.connect(wire());
    const bytes: number[] = [];
    for (let i = 0; i < 5; i++) bytes.push(0, 0, 0, 60 + i, ...udpFrame(60 + i));
    for (let at = 0; at < bytes.length; at += 7) {
      peer.socket.write(Uint8Array.from(bytes.slice(at, at + 7)));
      await pause(0);
    }
    for (let i = 0; i < 5; i++) expect((await net.receive()).frame).toEqual(udpFrame(60 + i));
    peer.send(...Array.from({ length: 60 }, (_, i) => udpFrame(60 + i)));
    for (let i = 0; i < 60; i++) expect((await net.receive()).frame).toEqual(udpFrame(60 + i));
  });

  it('keeps the order of many frames both ways, while the peer reads slowly', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const net = await open();
    const peer = await Peer.connect(wire());
    await until('the link', () => link().up);
    peer.socket.pause();
    const total = 2000;
    let next = 0;
    while (next < total) {
      const n = Math.min(50, total - next);
      for (let i = 0; i < n; i++) net.offer(udpFrame(1000, { source: next++ }));
      await net.driver.notify(1);
      for (let i = 0; i < n; i++) {
        if (net.tx.usedIndex === net.tx.nextUsed) peer.socket.resume();
        await net.tx.wait();
      }
    }
    peer.socket.resume();
    await until('all frames', () => peer.frames.length === total);
    expect(peer.frames.every((frame, i) => ((frame[34] << 8) | frame[35]) === i)).toBe(true);
  });

  it('leaves out frames that are too short or too long, and disconnects who sends nonsense', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const net = await open();
    const peer = await Peer.connect(wire());
    peer.send(new Uint8Array(13), new Uint8Array(0), new Uint8Array(9000), udpFrame(80));
    expect((await net.receive()).frame).toEqual(udpFrame(80));
    expect(link()).toMatchObject({ dropped: 3, received: 1 });
    peer.socket.write(Uint8Array.of(0xff, 0xff, 0xff, 0xff));
    await until('the end', () => peer.closed);
    const next = await Peer.connect(wire());
    next.send(udpFrame(81));
    expect((await net.receive()).frame).toEqual(udpFrame(81));
  });

  it('drops what is sent while there is no peer', async () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const net = await open();
    for (let i = 0; i < 5; i++) await net.send(udpFrame());
    expect(link()).toMatchObject({ up: false, dropped: 5 });
  });

  it('connects to a listener, now or later, and again', async () => {
    device = startDevice({ sockets: [path], link: `unix-connect:${wire()}` });
    const net = await open();
    for (let round = 0; round < 2; round++) {
      const peers: Peer[] = [];
      const server = createServer((socket) => peers.push(new Peer(socket)));
      closers.push(() => server.close());
      await new Promise<void>((resolve) => server.listen(wire(), resolve));
      await until('the connection', () => peers.length === 1);
      await until('the link', () => link().up);
      peers[0].send(udpFrame(90 + round));
      expect((await net.receive()).frame).toEqual(udpFrame(90 + round));
      await net.send(udpFrame(95));
      await until('the frame', () => peers[0].frames.length === 1);
      peers[0].socket.destroy();
      await new Promise((resolve) => server.close(resolve));
      await until('the link to go down', () => !link().up);
    }
  });

  it('is refused when somebody listens there', () => {
    device = startDevice({ sockets: [path], link: `unix:${wire()}` });
    const other = join(folder, 'other.sock');
    expect(() => startDevice({ sockets: [other], link: `unix:${wire()}` })).toThrow(
      expect.objectContaining({ code: 'SOCKET_IN_USE' }),
    );
    expect(existsSync(other)).toBe(false);
    expect(existsSync(wire())).toBe(true);
  });
});

describe('the pcap link', () => {
  it('plays a capture to the driver and records what it sends', async () => {
    const [input, output] = [join(folder, 'in.pcap'), join(folder, 'out.pcap')];
    const writer = new CaptureWriter(input, { linkType: LinkType.ethernet });
    for (let i = 0; i < 300; i++) {
      const frame = udpFrame(60 + i);
      writer.write(frame, 0, frame.length, i, 0);
    }
    writer.write(new Uint8Array(9000), 0, 9000, 0, 0);
    writer.close();
    device = startDevice({ sockets: [path], link: `pcap:${input},${output}` });
    const net = await open();
    for (let i = 0; i < 300; i++) {
      expect((await net.receive()).frame).toEqual(udpFrame(60 + i));
      if (i % 16 === 0) await net.driver.notify(0);
    }
    for (let i = 0; i < 10; i++) await net.send(udpFrame(100 + i));
    await until('the file', () => existsSync(output) && statSync(output).size > 10 * 100);
    const frames = Array.from(new CaptureReader(output), (record) => record.length);
    expect(frames).toEqual(Array.from({ length: 10 }, (_, i) => 100 + i));
    expect(link()).toMatchObject({ received: 300, sent: 10, dropped: 1 });
  });

  it('ends where a capture makes no sense, and the device goes on', async () => {
    const input = join(folder, 'in.pcap');
    const writer = new CaptureWriter(input, { linkType: LinkType.ethernet });
    for (let i = 0; i < 3; i++) writer.write(udpFrame(60 + i), 0, 60 + i, i, 0);
    writer.close();
    // A record of 4 GiB.
    appendFileSync(input, new Uint8Array(16).fill(0xff));
    const warnings: string[] = [];
    device = startDevice({ sockets: [path], link: `pcap:${input},`, onWarning: (text) => warnings.push(text) });
    const net = await open();
    for (let i = 0; i < 3; i++) expect((await net.receive()).frame).toEqual(udpFrame(60 + i));
    await until('the warning', () => warnings.length > 0);
    await net.send(udpFrame(100));
    await until('the frame', () => link().sent === 1);
    expect(warnings).toEqual([expect.stringContaining(`${input}: at byte`)]);
    await until('the packets', () => device.packetsInUse === 0);
  });

  it('ends where a capture cannot be written any more, and the device goes on', async () => {
    const warnings: string[] = [];
    device = startDevice({ sockets: [path], link: 'pcap:,/dev/full', onWarning: (text) => warnings.push(text) });
    const net = await open();
    await net.send(udpFrame(100));
    await until('the warning', () => warnings.length > 0);
    await net.send(udpFrame(100));
    await until('the frame', () => link().sent === 2);
    expect(warnings).toEqual([expect.stringContaining('ENOSPC')]);
    await until('the packets', () => device.packetsInUse === 0);
  });

  it.each([
    ['a capture that does not exist', 'pcap:/nonexistent/in.pcap,'],
    ['a folder that does not exist', 'pcap:,/nonexistent/out.pcap'],
    ['no comma', 'pcap:file'],
  ])('is refused with %s', (_, text) => {
    device = startDevice({ sockets: [path] });
    const other = join(folder, 'other.sock');
    expect(() => startDevice({ sockets: [other], link: text })).toThrow(
      expect.objectContaining({ name: 'InputError' }),
    );
    expect(existsSync(other)).toBe(false);
  });
});
