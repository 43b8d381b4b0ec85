/**
 * The wire of the demo: two Unix stream sockets that software devices connect to (`vipsec device --link unix-connect:PATH`),
 * frames passed from each to the other in order, everything that passes written to a capture.
 *
 * Whoever holds a wire can do what an attacker can: look, send a frame again, change one. A frame on the stream is a u32
 * big-endian length and as many bytes of Ethernet.
 */
import { once } from 'node:events';
import { createServer, type Server, type Socket } from 'node:net';
import { type CaptureWriter, VfioError } from '../../src/index.ts';

/** Bytes of the length before a frame; and the longest frame that is believed. */
const LENGTH_SIZE = 4;
const MAX_FRAME = 65_550;

/** One end of the wire. */
export type Side = 0 | 1;

export const SIDES: readonly Side[] = [0, 1];

/** Sees each frame before it goes on; may change it in place. `false` takes it off the wire. */
export type Tap = (from: Side, frame: Uint8Array) => boolean;

export class Wire {
  /** Called for each frame. */
  tap: Tap = () => true;
  /** Frames that came from each side. */
  readonly frames: [number, number] = [0, 0];
  readonly bytes: [number, number] = [0, 0];
  readonly #servers: Server[] = [];
  readonly #sockets: [Socket | null, Socket | null] = [null, null];
  readonly #pending: [Uint8Array, Uint8Array] = [new Uint8Array(0), new Uint8Array(0)];
  readonly #capture: CaptureWriter | null;
  #failure: Error | null = null;

  private constructor(capture: CaptureWriter | null) {
    this.#capture = capture;
  }

  /** Listens on one path for each side. */
  static async listen(paths: readonly [string, string], capture: CaptureWriter | null = null): Promise<Wire> {
    const wire = new Wire(capture);
    for (const side of SIDES) {
      const server = createServer((socket) => wire.#attach(side, socket));
      wire.#servers.push(server);
      server.listen(paths[side]);
      await once(server, 'listening');
    }
    return wire;
  }

  /** Both ends are connected. */
  get connected(): boolean {
    return this.#sockets[0] !== null && this.#sockets[1] !== null;
  }

  /** What broke the wire, if anything did. */
  get failure(): Error | null {
    return this.#failure;
  }

  /** Puts a frame on the wire towards `to`, as if the other side had sent it. */
  send(to: Side, frame: Uint8Array): void {
    const socket = this.#sockets[to];
    if (socket === null || socket.destroyed) return;
    this.#record(frame);
    const head = new Uint8Array(LENGTH_SIZE);
    head[0] = frame.length >>> 24;
    head[1] = frame.length >>> 16;
    head[2] = frame.length >>> 8;
    head[3] = frame.length;
    socket.write(head);
    if (!socket.write(frame)) this.#hold(to, socket);
  }

  /** Closes both ends and the listeners, which removes their sockets. */
  async close(): Promise<void> {
    for (const socket of this.#sockets) socket?.destroy();
    await Promise.all(this.#servers.map((server) => new Promise((done) => server.close(done))));
  }

  /** The reader of `to` is slow: take nothing more from the other side until it has caught up. */
  #hold(to: Side, socket: Socket): void {
    const source = this.#sockets[otherSide(to)];
    if (source === null || source.isPaused()) return;
    source.pause();
    socket.once('drain', () => source.resume());
  }

  #attach(side: Side, socket: Socket): void {
    if (this.#sockets[side] !== null) {
      socket.destroy();
      return;
    }
    this.#sockets[side] = socket;
    socket.on('error', (error) => this.#fail(error));
    socket.on('data', (chunk: Buffer) => this.#receive(side, chunk));
  }

  #receive(side: Side, chunk: Uint8Array): void {
    const kept = this.#pending[side];
    let bytes = chunk;
    if (kept.length > 0) {
      bytes = new Uint8Array(kept.length + chunk.length);
      bytes.set(kept);
      bytes.set(chunk, kept.length);
    }
    // What came in one piece goes on in one piece.
    const target = this.#sockets[otherSide(side)];
    target?.cork();
    let at = 0;
    while (bytes.length - at >= LENGTH_SIZE) {
      const length = ((bytes[at] << 24) | (bytes[at + 1] << 16) | (bytes[at + 2] << 8) | bytes[at + 3]) >>> 0;
      if (length > MAX_FRAME) {
        this.#fail(new VfioError('LINK_FRAMING', `side ${side} of the wire sent a frame of ${length} bytes`));
        return;
      }
      const start = at + LENGTH_SIZE;
      if (bytes.length < start + length) break;
      this.#pass(side, bytes.slice(start, start + length));
      at = start + length;
    }
    target?.uncork();
    this.#pending[side] = bytes.slice(at);
  }

  #pass(from: Side, frame: Uint8Array): void {
    this.frames[from]++;
    this.bytes[from] += frame.length;
    if (this.tap(from, frame)) this.send(otherSide(from), frame);
  }

  #record(frame: Uint8Array): void {
    if (this.#capture === null) return;
    const now = performance.timeOrigin + performance.now();
    const seconds = Math.floor(now / 1000);
    this.#capture.write(frame, 0, frame.length, seconds, Math.floor((now - seconds * 1000) * 1e6));
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    for (const socket of this.#sockets) socket?.destroy();
  }
}

/** The far end. */
export function otherSide(side: Side): Side {
  return side === 0 ? 1 : 0;
}
