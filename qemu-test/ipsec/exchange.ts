/**
 * What two applications do with a network between them, one way: echo requests that the other end's kernel answers, and UDP datagrams and a TCP
 * stream that its echo service sends back. Both can be in one process, each with sockets in a network namespace of its own. Every byte that comes
 * back is compared.
 */
import { randomBytes } from 'node:crypto';
import { type Epoll, Ready } from './epoll.ts';
import { SocketSet } from './socket-set.ts';
import { endSending } from './sockets.ts';

/** Where the echo service is, and where its datagrams come from. */
export const SERVICE_PORT = 7007;
const CLIENT_PORT = 7008;
/** Datagrams of which none came back within this time are sent again, so often. */
const RESEND_MS = 6_000;
const RESENDS = 9;
/** ICMP and ICMPv6 echo (RFC 792; RFC 4443, 4.1): type u8, code u8, checksum u16, identifier u16, sequence u16. */
const ECHO_REQUEST = { 4: 8, 6: 128 } as const;
const ICMP_HEADER = 8;
const SEQUENCE_AT = 7;
const PING_BYTES = 56;

export interface Application {
  /** Name of its network namespace; null: that of this process. */
  readonly namespace: string | null;
  readonly address: string;
}

/** What crosses, and comes back. */
export interface Amount {
  readonly pings: number;
  /** Bytes of each datagram; no two alike. */
  readonly sizes: readonly number[];
  /** Bytes of the TCP stream. */
  readonly bytes: number;
}

/** The echo service at one application for one client (RFC 862, on another port). */
export class EchoService {
  readonly #sockets: SocketSet;

  /** What happens then happens in `epoll.dispatch`. `onError`: why it does not go on. */
  constructor(epoll: Epoll, { namespace, address }: Application, client: Application, onError: (error: Error) => void) {
    this.#sockets = new SocketSet(epoll, onError);
    const local = { address, port: SERVICE_PORT };
    const remote = { address: client.address, port: CLIENT_PORT };
    this.#echoDatagrams(this.#sockets.connect('udp', namespace, local, remote));
    this.#echoStreams(this.#sockets.listen(namespace, local));
  }

  close(): void {
    this.#sockets.closeAll();
  }

  #echoDatagrams(fd: number): void {
    this.#sockets.watch(fd, Ready.in, () => {
      const datagram = this.#sockets.read(fd);
      if (datagram !== undefined) this.#sockets.write(fd, datagram);
    });
  }

  #echoStreams(listener: number): void {
    this.#sockets.watch(listener, Ready.in, () => {
      const fd = this.#sockets.accept(listener);
      if (fd >= 0) this.#echoStream(fd);
    });
  }

  #echoStream(fd: number): void {
    /** What was received and could not be sent back yet: nothing more is received then. */
    let waiting: Uint8Array = new Uint8Array();
    this.#sockets.watch(fd, Ready.in, () => {
      const part = waiting.length > 0 ? waiting : this.#sockets.read(fd);
      if (part === undefined) return;
      if (part.length === 0) {
        this.#sockets.close(fd);
        return;
      }
      const sent = this.#sockets.write(fd, part);
      const before = waiting.length;
      waiting = part.slice(sent);
      if (before === 0 && waiting.length > 0) this.#sockets.change(fd, Ready.out);
      if (before > 0 && waiting.length === 0) this.#sockets.change(fd, Ready.in);
    });
  }
}

export class Exchange {
  /** Resolved when everything has come back, and rejected when it has not or was different. */
  readonly done: Promise<void>;
  readonly #sockets: SocketSet;
  readonly #client: Application;
  readonly #server: Application;
  /** What is still missing, by name, and what sends it again. */
  readonly #missing = new Map<string, (() => void) | null>();
  readonly #timer: NodeJS.Timeout;
  #resends = 0;
  #resolve = () => {};
  #reject: (error: Error) => void = () => {};

  /** Between `client` and the echo service at `server`. Begins at once, throws nothing; what happens then happens in `epoll.dispatch`. */
  constructor(epoll: Epoll, client: Application, server: Application, { pings, sizes, bytes }: Amount) {
    this.#client = client;
    this.#server = server;
    this.done = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.#sockets = new SocketSet(epoll, this.#reject);
    this.#timer = setInterval(() => this.#sendAgain(), RESEND_MS);
    this.#try(() => {
      if (pings > 0) this.#sendPings(pings);
      this.#sendDatagrams(sizes);
      this.#sendStream(bytes);
    });
  }

  close(): void {
    clearInterval(this.#timer);
    this.#sockets.closeAll();
  }

  #sendPings(count: number): void {
    const { namespace, address } = this.#client;
    const fd = this.#sockets.connect(
      'ping',
      namespace,
      { address, port: 0 },
      { address: this.#server.address, port: 0 },
    );
    const type = ECHO_REQUEST[address.includes(':') ? 6 : 4];
    const payloads = Array.from({ length: count }, () => randomBytes(PING_BYTES));
    for (const [sequence, payload] of payloads.entries()) {
      const request = Buffer.concat([Uint8Array.of(type, 0, 0, 0, 0, 0, 0, sequence), payload]);
      this.#begin(`ping ${sequence}`, () => this.#sockets.write(fd, request));
    }
    this.#sockets.watch(fd, Ready.in, () => {
      const reply = this.#sockets.read(fd);
      if (reply === undefined) return;
      const sequence = reply[SEQUENCE_AT];
      compare(`ping ${sequence}`, payloads[sequence], reply.subarray(ICMP_HEADER));
      this.#arrived(`ping ${sequence}`);
    });
  }

  #sendDatagrams(sizes: readonly number[]): void {
    const { namespace, address } = this.#client;
    const remote = { address: this.#server.address, port: SERVICE_PORT };
    const fd = this.#sockets.connect('udp', namespace, { address, port: CLIENT_PORT }, remote);
    const sent = new Map(sizes.map((size) => [size, randomBytes(size)]));
    for (const [size, data] of sent) this.#begin(`datagram of ${size} bytes`, () => this.#sockets.write(fd, data));
    this.#sockets.watch(fd, Ready.in, () => {
      const datagram = this.#sockets.read(fd);
      if (datagram === undefined) return;
      const name = `datagram of ${datagram.length} bytes`;
      compare(name, sent.get(datagram.length), datagram);
      this.#arrived(name);
    });
  }

  #sendStream(bytes: number): void {
    const name = `TCP stream of ${bytes} bytes`;
    const { namespace, address } = this.#client;
    const remote = { address: this.#server.address, port: SERVICE_PORT };
    const fd = this.#sockets.connect('tcp', namespace, { address, port: 0 }, remote);
    const data = randomBytes(bytes);
    let sent = 0;
    let received = 0;
    this.#missing.set(name, null);
    this.#sockets.watch(fd, Ready.in | Ready.out, (events) => {
      // Of an error the system call says which one it is.
      if (sent < bytes && (events & (Ready.out | Ready.error)) !== 0) {
        sent += this.#sockets.write(fd, data.subarray(sent));
        if (sent === bytes) {
          endSending(fd);
          this.#sockets.change(fd, Ready.in);
        }
      }
      if ((events & ~Ready.out) === 0) return;
      const part = this.#sockets.read(fd);
      if (part === undefined) return;
      compare(name, data.subarray(received, received + part.length), part);
      received += part.length;
      if (part.length > 0) return;
      if (received !== bytes) throw new Error(`only ${received} bytes of the ${name} came back`);
      this.#sockets.close(fd);
      this.#arrived(name);
    });
  }

  #try(work: () => void): void {
    try {
      work();
    } catch (error) {
      this.#reject(error instanceof Error ? error : new Error(String(error)));
    }
  }

  #begin(name: string, send: () => void): void {
    this.#missing.set(name, send);
    send();
  }

  #arrived(name: string): void {
    this.#missing.delete(name);
    if (this.#missing.size === 0) this.#resolve();
  }

  #sendAgain(): void {
    const missing = [...this.#missing];
    if (this.#resends++ < RESENDS) {
      this.#try(() => {
        for (const [, send] of missing) send?.();
      });
    } else this.#reject(new Error(`nothing came back of: ${missing.map(([name]) => name).join(', ')}`));
  }
}

function compare(name: string, sent: Uint8Array | undefined, received: Uint8Array): void {
  if (sent === undefined || Buffer.compare(sent, received) !== 0) throw new Error(`the ${name} came back changed`);
}
