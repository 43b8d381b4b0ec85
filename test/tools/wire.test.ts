import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { CaptureReader, CaptureWriter } from '../../src/packet/capture-file.ts';
import { Wire } from '../../tools/demo/wire.ts';

let folder = '';
let wire: Wire;
let sockets: Socket[] = [];
let capture: CaptureWriter;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-wire-'));
  capture = new CaptureWriter(join(folder, 'wire.pcap'), { linkType: 1, nanoseconds: true });
  wire = await Wire.listen([join(folder, 'a'), join(folder, 'b')], capture);
});
afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  sockets = [];
  await wire.close();
  capture.close();
  rmSync(folder, { recursive: true });
});

async function join2(): Promise<[Socket, Socket]> {
  for (const name of ['a', 'b']) {
    const socket = connect(join(folder, name));
    await once(socket, 'connect');
    sockets.push(socket);
  }
  while (!wire.connected) await new Promise(setImmediate);
  return [sockets[0], sockets[1]];
}

const framed = (...bytes: number[]): Uint8Array => Uint8Array.from([0, 0, 0, bytes.length, ...bytes]);

/** Reads frames until `count` are there. */
async function frames(socket: Socket, count: number): Promise<number[][]> {
  let bytes = Buffer.alloc(0);
  const found: number[][] = [];
  while (found.length < count) {
    const [chunk] = await once(socket, 'data');
    bytes = Buffer.concat([bytes, chunk]);
    while (bytes.length >= 4 && bytes.length >= 4 + bytes.readUInt32BE(0)) {
      const length = bytes.readUInt32BE(0);
      found.push([...bytes.subarray(4, 4 + length)]);
      bytes = bytes.subarray(4 + length);
    }
  }
  return found;
}

test('frames cross both ways in order, however the stream is cut', async () => {
  const [a, b] = await join2();
  const stream = Buffer.concat([framed(1, 2, 3), framed(), framed(4), framed(...new Array(200).fill(7))]);
  const expected = [[1, 2, 3], [], [4], new Array(200).fill(7)];
  const arrived = frames(b, 4);
  for (const byte of stream) {
    a.write(Uint8Array.of(byte));
    await new Promise(setImmediate);
  }
  expect(await arrived).toEqual(expected);
  const back = frames(a, 4);
  b.write(stream);
  expect(await back).toEqual(expected);
  expect(wire.frames).toEqual([4, 4]);
  capture.flush();
  using reader = new CaptureReader(join(folder, 'wire.pcap'));
  expect([...reader].length).toBe(8);
});

test('a tap can change a frame, take it off the wire, and send one again', async () => {
  const [a, b] = await join2();
  wire.tap = (from, frame) => {
    expect(from).toBe(0);
    if (frame[0] === 1) return false;
    if (frame[0] === 2) wire.send(1, Uint8Array.of(9));
    frame[0] ^= 0x80;
    return true;
  };
  const arrived = frames(b, 3);
  a.write(Buffer.concat([framed(1), framed(2), framed(3)]));
  expect(await arrived).toEqual([[9], [0x82], [0x83]]);
});

test('an unbelievable length breaks the wire with a typed error', async () => {
  const [a, b] = await join2();
  a.write(Uint8Array.of(0xff, 0, 0, 0));
  await once(b, 'close');
  expect(wire.failure).toMatchObject({ code: 'LINK_FRAMING' });
});

test('closing removes the sockets', async () => {
  await join2();
  await wire.close();
  expect(existsSync(join(folder, 'a'))).toBe(false);
  expect(existsSync(join(folder, 'b'))).toBe(false);
});
