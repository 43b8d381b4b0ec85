/**
 * Sends UDP datagrams from the network namespace that it runs in: `node datagrams.mjs ADDRESS COUNT SIZE [echo]`. Datagram i has its number,
 * u32 big-endian, then bytes i, i + 1 …; the last ones of a run are shorter by one byte each. With `echo` each burst waits until all of
 * it has come back as it was. Prints how many datagrams that were.
 */
import { createSocket } from 'node:dgram';
import { once } from 'node:events';

const [address, count, size, echo] = process.argv.slice(2);
const PORT = 7;
const BURST = 16;

const datagrams = Array.from({ length: Number(count) }, (_, i) => {
  const bytes = Buffer.from({ length: Math.max(4, Number(size) - (i % BURST)) }, (_, k) => i + k);
  bytes.writeUInt32BE(i);
  return bytes;
});
const socket = createSocket('udp4');
await new Promise((resolve) => socket.connect(PORT, address, resolve));
for (let first = 0; first < datagrams.length; first += BURST) {
  const burst = datagrams.slice(first, first + BURST);
  const back = [];
  socket.on('message', (bytes) => {
    back.push(bytes);
    if (back.length === burst.length) socket.emit('all');
  });
  const all = once(socket, 'all');
  await Promise.all(burst.map((bytes) => new Promise((resolve) => socket.send(bytes, resolve))));
  if (echo !== 'echo') continue;
  await all;
  socket.removeAllListeners('message');
  if (!back.every((bytes, i) => bytes.equals(burst[i])))
    throw new Error(`datagrams from ${first} on came back changed`);
}
socket.close();
process.stdout.write(`${datagrams.length}\n`);
