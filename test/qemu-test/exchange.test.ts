/** The applications of the IPsec scenarios, over loopback: without a service that does its job they must not be content. */
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { IpCommand } from '../../qemu-test/guest/ip.ts';
import { Epoll } from '../../qemu-test/ipsec/epoll.ts';
import { type Amount, EchoService, Exchange, SERVICE_PORT } from '../../qemu-test/ipsec/exchange.ts';

const AMOUNT: Amount = { pings: 0, sizes: [1, 64, 500, 1200], bytes: 300_000 };
const NO_STREAM: Amount = { pings: 0, sizes: [1, 64], bytes: 1 };
/** Of loopback, and of this process only. */
const host = (n: number) => `127.${64 + ((process.pid >> 8) & 63)}.${process.pid & 255}.${n}`;
const client = { namespace: null, address: host(1) };
const server = { namespace: null, address: host(2) };

describe('an exchange between two applications', () => {
  let epoll: Epoll;
  let over: boolean;
  let driven: Promise<void>;
  const cleanUps: (() => unknown)[] = [];

  beforeEach(() => {
    epoll = new Epoll();
    over = false;
    driven = (async () => {
      while (!over) {
        await epoll.sleep(20);
        epoll.dispatch();
      }
    })();
  });

  afterEach(async () => {
    for (const cleanUp of cleanUps.splice(0).reverse()) await cleanUp();
    over = true;
    await driven;
    await epoll.close();
  });

  function exchange(amount: Amount): Exchange {
    const result = new Exchange(epoll, client, server, amount);
    cleanUps.push(() => result.close());
    return result;
  }

  function serve(): void {
    const service = new EchoService(epoll, server, client, () => {});
    cleanUps.push(() => service.close());
  }

  /** A service that sends other datagrams, or another stream, than it received. */
  async function serveOtherwise(datagram: (d: Buffer) => Buffer, stream: (socket: Socket) => void): Promise<void> {
    const socket = createSocket('udp4');
    socket.on('message', (message, from) => socket.send(datagram(message), from.port, from.address));
    socket.bind(SERVICE_PORT, server.address);
    const listener = createServer({ allowHalfOpen: true }, (connection) => {
      connection.on('error', () => connection.destroy());
      cleanUps.push(() => connection.destroy());
      stream(connection);
    });
    listener.listen(SERVICE_PORT, server.address);
    await Promise.all([once(socket, 'listening'), once(listener, 'listening')]);
    cleanUps.push(() => new Promise<void>((resolve) => socket.close(resolve)));
    cleanUps.push(() => new Promise((resolve) => listener.close(resolve)));
  }
  const changed = (bytes: Buffer) => Buffer.from(bytes).fill(bytes[bytes.length - 1] ^ 1, bytes.length - 1);

  it('is done when datagrams and a stream that no buffer holds at once have come back', async () => {
    serve();
    await exchange(AMOUNT).done;
  });

  it('closes its sockets, so that the same hosts can have another', async () => {
    for (let i = 0; i < 2; i++) {
      const service = new EchoService(epoll, server, client, () => {});
      const both = new Exchange(epoll, client, server, AMOUNT);
      await both.done;
      both.close();
      service.close();
    }
  });

  it('fails when a datagram comes back changed', async () => {
    await serveOtherwise(changed, (socket) => socket.pipe(socket));
    await expect(exchange(AMOUNT).done).rejects.toThrow(/datagram of \d+ bytes came back changed/);
  });

  it('fails when a byte of the stream comes back changed', async () => {
    const other = (socket: Socket) => socket.on('data', (chunk) => socket.write(changed(chunk)));
    await serveOtherwise((message) => message, other);
    await expect(exchange(AMOUNT).done).rejects.toThrow(/TCP stream of 300000 bytes came back changed/);
  });

  it('fails when a part of the stream is missing', async () => {
    const other = (socket: Socket) => socket.on('data', () => {}).on('end', () => socket.end());
    await serveOtherwise((message) => message, other);
    await expect(exchange(NO_STREAM).done).rejects.toThrow(/only 0 bytes/);
  });

  it('fails when there is no service', async () => {
    await expect(exchange(AMOUNT).done).rejects.toThrow(/ECONNREFUSED/);
  });
});

describe('a long-lived ip', () => {
  const shell = (script: string) => new IpCommand(['sh', '-c', script]);

  it('gives each question its own answer, and ends well', async () => {
    const ip = shell('while read -r line; do echo "is: $line"; done');
    const answers = ['a', 'b', 'c'].map((name) => ip.ask([`${name} 1`, `${name} 2`], /(?:is: .*\n){2}/));
    expect(await Promise.all(answers)).toEqual(['a', 'b', 'c'].map((name) => `is: ${name} 1\nis: ${name} 2\n`));
    await ip.stop();
  });

  it('says what it complained about when it ends at a command', async () => {
    const ip = shell('read -r line; echo "no $line" >&2; exit 2');
    ip.run(['such thing']);
    await expect(ip.ask(['question'], /answer/)).rejects.toThrow('ip ended with 2: no such thing');
    await expect(ip.ask(['another'], /answer/)).rejects.toThrow('ended with 2');
    await expect(ip.stop()).rejects.toThrow('ended with 2');
  });

  it('fails when it cannot be started', async () => {
    const ip = new IpCommand(['/nonexistent/ip']);
    await expect(ip.ask(['question'], /answer/)).rejects.toThrow('ENOENT');
  });
});
