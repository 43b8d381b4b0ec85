/**
 * A scripted vfio-user client that shares the event loop with the server under test: it sends exactly the messages
 * that a test wants and never blocks.
 */
import { close } from '../../../src/sys/libc.ts';
import { UnixSocket } from '../../../src/sys/unix-socket.ts';
import { MessageSocket, type ReceivedMessage } from '../../../src/vfio/message-socket.ts';
import * as protocol from '../../../src/vfio/protocol.ts';

/** Waits until `condition` holds, letting the event loop run; throws after `timeout` ms. */
export async function until(what: string, condition: () => boolean, timeout = 20_000): Promise<void> {
  const deadline = performance.now() + timeout;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`timed out: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** Lets the event loop run for a while. */
export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

export class RawClient {
  readonly socket: UnixSocket;
  readonly #messages: MessageSocket;
  #id = 0;

  constructor(path: string) {
    this.socket = UnixSocket.connect(path, 0);
    this.#messages = new MessageSocket(this.socket, 8);
  }

  /** Connects and agrees on the version. */
  static async open(path: string): Promise<RawClient> {
    const client = new RawClient(path);
    const reply = await client.request(versionRequest());
    if (reply.error !== 0) throw new Error(`VERSION: ${reply.error}`);
    return client;
  }

  /** Sends a request and waits for its reply. */
  async request(message: Uint8Array, descriptors: readonly number[] = []): Promise<ReceivedMessage> {
    const id = this.post(message, descriptors);
    const reply = await this.receive();
    if (reply === null) throw new Error('the server closed the session');
    if (reply.id !== id) throw new Error(`reply to ${reply.id} instead of ${id}`);
    return reply;
  }

  /** Sends a request without waiting; returns its id. */
  post(message: Uint8Array, descriptors: readonly number[] = []): number {
    const id = ++this.#id & 0xffff;
    this.#messages.send(message, id, performance.now() + 1000, descriptors);
    return id;
  }

  /** The next message; null when the server has closed the session. */
  async receive(timeout = 20_000): Promise<ReceivedMessage | null> {
    let message: ReceivedMessage | null = null;
    let closed = false;
    await until(
      'a reply',
      () => {
        try {
          message = this.#messages.tryReceive();
        } catch {
          closed = true;
        }
        return closed || message !== null;
      },
      timeout,
    );
    return closed ? null : message;
  }

  /** Whether the server ends the session. */
  async isClosed(): Promise<boolean> {
    return (await this.receive()) === null;
  }

  async read(region: number, offset: number, width: number): Promise<number> {
    const reply = await this.request(protocol.encodeRegionRead(region, offset, width));
    if (reply.error !== 0) throw new Error(`read of region ${region} at ${offset}: errno ${reply.error}`);
    const { data } = protocol.decodeRegionAccess(reply.payload, true);
    let value = 0;
    for (let i = width - 1; i >= 0; i--) value = value * 256 + data[i];
    return value;
  }

  async write(region: number, offset: number, width: number, value: number): Promise<void> {
    const data = new Uint8Array(width);
    for (let i = 0; i < width; i++) data[i] = Math.floor(value / 2 ** (8 * i));
    const reply = await this.request(protocol.encodeRegionWrite(region, offset, data));
    if (reply.error !== 0) throw new Error(`write of region ${region} at ${offset}: errno ${reply.error}`);
  }

  /** Returns the errno. `fd` stays the caller's. */
  async dmaMap(iova: number, size: number, fd: number | null, offset = 0, flags = 3): Promise<number> {
    const message = protocol.encodeDmaMap({ flags, offset, address: iova, size });
    return (await this.request(message, fd === null ? [] : [fd])).error;
  }

  async dmaUnmap(iova: number, size: number, flags = 0): Promise<number> {
    return (await this.request(protocol.encodeDmaUnmap({ flags, address: iova, size }))).error;
  }

  close(): void {
    this.#messages.close();
  }
}

export function versionRequest(major = 0): Uint8Array {
  const payload = protocol.encodeVersion({ major, minor: 0, capabilities: protocol.DEFAULT_CAPABILITIES });
  const message = protocol.request(protocol.Command.version, payload.length);
  message.set(payload, protocol.Header.length);
  return message;
}

/** Number of open descriptors of this process. */
export async function openDescriptors(): Promise<number> {
  const { readdirSync } = await import('node:fs');
  return readdirSync('/proc/self/fd').length;
}

export { close as closeDescriptor };
