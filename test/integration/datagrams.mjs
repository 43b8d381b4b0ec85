/**
 * Sends UDP datagrams from the network namespace that it runs in: `node datagrams.mjs ADDRESS FIRST COUNT SIZE [echo]`. Datagram i, of
 * `COUNT` from number `FIRST` on, has bytes i, i + 1 … behind its number, u32 big-endian; those of a burst are shorter by one byte each. With
 * `echo` each burst waits until all of it has come back as it was. Prints how many datagrams that were.
 */
import { createSocket } from 'node:dgram';

const [address, first, count, size, echo] = process.argv.slice(2);
const PORT = 7;
const BURST = 16;

const datagrams = Array.from({ length: Number(count) }, (_, i) => {
  const number = Number(first) + i;
  const bytes = Buffer.from({ length: Math.max(4, Number(size) - (i % BURST)) }, (_, k) => number + k);
  bytes.writeUInt32BE(number);
  return bytes;
});
const socket = createSocket('udp4');
await new Promise((resolve) => socket.connect(PORT, address, resolve));
for (let at = 0; at < datagrams.length; at += BURST) {
  const burst = datagrams.slice(at, at + BURST);
  const echoes = echo === 'echo' ? receive(burst.length) : burst;
  await Promise.all(burst.map((bytes) => new Promise((resolve) => socket.send(bytes, resolve))));
  const back = await echoes;
  if (!back.every((bytes, i) => bytes.equals(burst[i]))) throw new Error(`datagrams from ${at} on came back changed`);
}
socket.close();
process.stdout.write(`${datagrams.length}\n`);

function receive(count) {
  const back = [];
  return new Promise((resolve) => {
    const take = (bytes) => {
      if (back.push(bytes) < count) return;
      socket.off('message', take);
      resolve(back);
    };
    socket.on('message', take);
  });
}
