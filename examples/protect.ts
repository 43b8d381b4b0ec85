/**
 * Protects what it sends: opens a NIC, makes an SA, sends ten UDP packets under it, and says where the SA ran.
 *
 * ```
 * vipsec device --socket /tmp/nic.sock &
 * node dist/examples/protect.js vfio-user:/tmp/nic.sock
 * ```
 */
import { randomBytes } from 'node:crypto';
import { openNic } from '../src/index.ts';

/** An Ethernet frame with an IPv4 UDP packet from 10.0.0.1 to 10.0.0.2 (port 9, discard). */
function frame(from: Uint8Array, text: string): Uint8Array {
  const payload = new TextEncoder().encode(text);
  const bytes = Buffer.alloc(14 + 20 + 8 + payload.length);
  bytes.fill(0xff, 0, 6);
  bytes.set(from, 6);
  bytes.set([0x08, 0x00, 0x45, 0], 12);
  bytes.writeUInt16BE(20 + 8 + payload.length, 16);
  bytes.set([0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 9], 18);
  bytes.writeUInt16BE(8 + payload.length, 38);
  bytes.set(payload, 42);
  let sum = 0;
  for (let i = 14; i < 34; i += 2) sum += bytes.readUInt16BE(i);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  bytes.writeUInt16BE(~sum & 0xffff, 24);
  return bytes;
}

const address = process.argv[2];
if (address === undefined) {
  process.stderr.write('usage: protect DEVICE\n');
  process.exit(2);
}

const nic = await openNic(address);
try {
  const sa = await nic.ipsec.addSa({
    direction: 'outbound',
    mode: 'tunnel',
    spi: 0x1000,
    // A key is used for one SA only: random here, from IKE in real life.
    aead: { name: 'aes-gcm', key: randomBytes(32), salt: randomBytes(4) },
    tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
    lifetime: { softPackets: 5 },
  });
  sa.on('soft-expiry', () => process.stdout.write('the SA asks to be renewed\n'));

  const burst = new Uint32Array(10);
  const n = nic.packets.allocate(burst, burst.length);
  for (let i = 0; i < n; i++) {
    nic.packets.write(burst[i], frame(nic.mac, `packet ${i}`));
    nic.packets.sa[burst[i]] = sa.handle;
  }
  const sent = nic.queues[0].tx.burst(burst, n);
  nic.packets.free(burst.subarray(sent), n - sent);

  await new Promise((resolve) => setTimeout(resolve, 50));
  const { packets, bytes } = sa.traffic();
  process.stdout.write(`${packets} packets, ${bytes} bytes, ${sa.placement.where}: ${sa.placement.because}\n`);
} finally {
  await nic.close();
}
