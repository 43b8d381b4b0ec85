/**
 * The host's end of a NIC's link: each Ethernet frame behind its length (u32, big-endian), both ways. QEMU's stream netdev connects here;
 * to the link of a device process we connect.
 */
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';

const LENGTH_BYTES = 4;
const MAX_FRAME = 65_550;

interface Waiter {
  readonly wanted: (frame: Buffer) => boolean;
  readonly resolve: (frame: Buffer) => void;
  readonly reject: (error: Error) => void;
}

export class FramePort {
  readonly #server: Server | undefined;
  /** Where to connect to, when it is us who connects. */
  readonly #path: string | undefined;
  #peer: Socket | undefined;
  #rest: Buffer = Buffer.alloc(0);
  #received: Buffer[] = [];
  #waiting: Waiter[] = [];
  #failure: Error | undefined;
  /** Called with each frame that nobody waits for; without it such frames are kept for `next`. */
  onFrame: ((frame: Buffer) => void) | undefined;
  /** Frames that arrived. */
  count = 0;

  private constructor(server: Server | undefined, path?: string) {
    this.#server = server;
    this.#path = path;
  }

  static async listen(path: string): Promise<FramePort> {
    const server = createServer();
    const port = new FramePort(server);
    server.on('connection', (socket) => port.#connected(socket));
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
    });
    return port;
  }

  /** To the link of a device process, `unix:PATH`. */
  static async connect(path: string): Promise<FramePort> {
    const port = new FramePort(undefined, path);
    await port.plug();
    return port;
  }

  /** Connects again after `unplug`. Only where it is us who connects. */
  async plug(): Promise<void> {
    if (this.#path === undefined) throw new Error('the other side connects');
    const socket = connect(this.#path);
    await once(socket, 'connect');
    this.#connected(socket);
  }

  /** Ends the connection: the device sees its link go down. */
  unplug(): void {
    this.#peer?.destroy();
    this.#peer = undefined;
  }

  /** Frames wait here because the other side does not take them. */
  get behind(): boolean {
    return this.#peer?.writableNeedDrain === true;
  }

  send(frame: Uint8Array): void {
    if (this.#peer === undefined) throw new Error('no guest is connected');
    const length = Buffer.alloc(LENGTH_BYTES);
    length.writeUInt32BE(frame.length);
    this.#peer.write(Buffer.concat([length, frame]));
  }

  /** The next frame for which `wanted` holds; others stay. */
  next(wanted: (frame: Buffer) => boolean, timeoutMs: number): Promise<Buffer> {
    const at = this.#received.findIndex(wanted);
    if (at >= 0) return Promise.resolve(this.#received.splice(at, 1)[0]);
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      const waiter: Waiter = {
        wanted,
        resolve: (frame: Buffer) => {
          clearTimeout(timer);
          resolve(frame);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      };
      const timer = setTimeout(() => {
        this.#waiting = this.#waiting.filter((w) => w !== waiter);
        reject(new Error(`no such frame within ${timeoutMs} ms (${this.count} came in all)`));
      }, timeoutMs);
      this.#waiting.push(waiter);
    });
  }

  /** Reads nothing for `ms` milliseconds. */
  hold(ms: number): void {
    const peer = this.#peer;
    peer?.pause();
    setTimeout(() => peer?.resume(), ms);
  }

  /** Forgets the frames that nobody took. */
  discard(): void {
    this.#received = [];
  }

  /** Whoever waits for a frame, now or later, gets `error`: none will come. */
  fail(error: Error): void {
    this.#failure = error;
    for (const waiter of this.#waiting.splice(0)) waiter.reject(error);
  }

  close(): void {
    this.#peer?.destroy();
    this.#server?.close();
  }

  #connected(socket: Socket): void {
    this.#peer?.destroy();
    this.#peer = socket;
    this.#rest = Buffer.alloc(0);
    socket.on('data', (chunk: Buffer) => this.#arrived(chunk));
    socket.on('error', () => socket.destroy());
  }

  #arrived(chunk: Buffer): void {
    let bytes = this.#rest.length === 0 ? chunk : Buffer.concat([this.#rest, chunk]);
    while (bytes.length >= LENGTH_BYTES) {
      const length = bytes.readUInt32BE(0);
      if (length > MAX_FRAME) {
        this.fail(new Error(`the stream is broken: a frame of ${length} bytes`));
        this.#peer?.destroy();
        return;
      }
      if (bytes.length < LENGTH_BYTES + length) break;
      this.#frame(Buffer.from(bytes.subarray(LENGTH_BYTES, LENGTH_BYTES + length)));
      bytes = bytes.subarray(LENGTH_BYTES + length);
    }
    this.#rest = bytes;
  }

  #frame(frame: Buffer): void {
    this.count++;
    const at = this.#waiting.findIndex((w) => w.wanted(frame));
    if (at >= 0) this.#waiting.splice(at, 1)[0].resolve(frame);
    else if (this.onFrame !== undefined) this.onFrame(frame);
    else this.#received.push(frame);
  }
}
