/**
 * The application of a network namespace: an echo service for UDP and TCP, and a client of the one in another namespace, which checks what comes
 * back. All of them are this process.
 */
import { createHash, randomBytes } from 'node:crypto';
import { createSocket, type Socket as DatagramSocket } from 'node:dgram';
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { ECHO_PORT } from '../ipsec/echo.ts';
import { inNamespaceForATick } from './network-namespace.ts';

/** Generous: a guest without its share of a busy machine is slower than any network. */
const STALLED_MS = 60_000;
/** A datagram that has not come back after so long is sent again, so often. */
const LOST_MS = 6_000;
const ATTEMPTS = 5;

export class Application implements AsyncDisposable {
  readonly #namespace: string | null;
  readonly #datagrams: DatagramSocket;
  readonly #server: Server;
  readonly #accepted = new Set<Socket>();

  private constructor(namespace: string | null) {
    this.#namespace = namespace;
    this.#datagrams = createSocket('udp4');
    this.#datagrams.on('message', (message, from) => this.#datagrams.send(message, from.port, from.address));
    this.#datagrams.on('error', () => {});
    this.#server = createServer((socket) => {
      this.#accepted.add(socket);
      socket.once('close', () => this.#accepted.delete(socket));
      socket.on('error', () => socket.destroy());
      socket.pipe(socket);
    });
  }

  /** Starts the echo service of a namespace; null: the one of this process. */
  static async start(namespace: string | null): Promise<Application> {
    const application = new Application(namespace);
    const { promise } = await inNamespaceForATick(namespace, () => ({ promise: application.#listen() }));
    await promise;
    return application;
  }

  /** Sends a datagram of each size, one after the other, and needs their echos. */
  async datagrams(to: string, sizes: readonly number[]): Promise<string> {
    let lost = 0;
    await this.#withSockets(1, async ([socket]) => {
      for (const size of sizes) lost += await exchange(socket, to, randomBytes(size));
    });
    return `${sizes.length} datagrams${lost === 0 ? '' : `, ${lost} lost`}`;
  }

  /** Sends a datagram from each of `count` ports, all at the same time, and needs their echos. */
  flows(to: string, count: number, size: number): Promise<unknown> {
    return this.#withSockets(count, (sockets) =>
      Promise.all(sockets.map((socket) => exchange(socket, to, randomBytes(size)))),
    );
  }

  /** Sends `bytes` over TCP and compares what comes back. */
  async stream(to: string, bytes: number): Promise<string> {
    const data = randomBytes(bytes);
    const started = performance.now();
    const socket = await inNamespaceForATick(this.#namespace, () => connect({ host: to, port: ECHO_PORT }));
    socket.setTimeout(STALLED_MS, () => socket.destroy(new Error('it has stalled')));
    const hash = createHash('sha256');
    let received = 0;
    socket.on('data', (chunk: Buffer) => {
      hash.update(chunk);
      received += chunk.length;
    });
    socket.once('connect', () => {
      // Who is not in the namespace where it ought to be talks to itself.
      if (socket.localAddress === to) socket.destroy(new Error('it goes by the loopback'));
      else socket.end(data);
    });
    try {
      await once(socket, 'end');
    } catch (error) {
      throw new Error(`TCP to ${to}, ${received} of ${bytes} bytes: ${String(error)}`);
    } finally {
      socket.destroy();
    }
    if (received !== bytes || hash.digest('hex') !== createHash('sha256').update(data).digest('hex')) {
      throw new Error(`TCP to ${to} gave back ${received} of ${bytes} bytes, or others`);
    }
    return `${bytes / 1024} KiB and back in ${Math.round(performance.now() - started)} ms`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#accepted) socket.destroy();
    const over = [once(this.#server, 'close'), once(this.#datagrams, 'close')];
    this.#server.close();
    this.#datagrams.close();
    await Promise.all(over);
  }

  #listen(): Promise<unknown> {
    const ready = [once(this.#server, 'listening'), once(this.#datagrams, 'listening')];
    this.#server.listen(ECHO_PORT);
    this.#datagrams.bind(ECHO_PORT);
    return Promise.all(ready);
  }

  /** Has `use` work with sockets for datagrams, each with a port of its own. */
  async #withSockets<T>(count: number, use: (sockets: readonly DatagramSocket[]) => Promise<T>): Promise<T> {
    const sockets = Array.from({ length: count }, () => createSocket('udp4'));
    try {
      await inNamespaceForATick(this.#namespace, () => {
        for (const socket of sockets) socket.bind();
      });
      return await use(sockets);
    } finally {
      for (const socket of sockets) socket.close();
    }
  }
}

/** Sends a datagram and waits for its echo; returns how often one of them was lost. */
async function exchange(socket: DatagramSocket, to: string, data: Buffer): Promise<number> {
  for (let lost = 0; lost < ATTEMPTS; lost++) {
    const over = new AbortController();
    const heard = once(socket, 'message', over).then(([message]): unknown => message);
    // What cannot be sent is lost, too.
    socket.send(data, ECHO_PORT, to, () => {});
    const echo = await Promise.race([heard, sleep(LOST_MS, undefined, over)]).finally(() => over.abort());
    // Of another length is what was taken for lost before.
    if (!(echo instanceof Uint8Array) || echo.length !== data.length) continue;
    if (Buffer.compare(echo, data) === 0) return lost;
    throw new Error(`a datagram of ${data.length} bytes to ${to} came back changed`);
  }
  throw new Error(`no echo of ${data.length} bytes from ${to}`);
}
