/** The echo service (RFC 862) over UDP and TCP, both IP versions. */
import { createSocket } from 'node:dgram';
import { createServer } from 'node:net';

export const ECHO_PORT = 7;

export function serveEcho(): void {
  for (const type of ['udp4', 'udp6'] as const) {
    const socket = createSocket({ type, ipv6Only: type === 'udp6' });
    socket.on('message', (message, from) => socket.send(message, from.port, from.address));
    socket.on('error', () => {});
    socket.bind(ECHO_PORT);
  }
  const server = createServer((socket) => {
    socket.on('error', () => socket.destroy());
    socket.pipe(socket);
  });
  server.listen(ECHO_PORT, '::');
}
