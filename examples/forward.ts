/**
 * Forwards between two NICs, protecting one way and opening the other: the core of a gateway in a page.
 *
 * ```
 * vipsec device --socket /tmp/inside.sock --link unix:/tmp/inside.link &
 * vipsec device --socket /tmp/outside.sock --link unix:/tmp/outside.link &
 * node dist/examples/forward.js vfio-user:/tmp/inside.sock vfio-user:/tmp/outside.sock sa.json
 * ```
 *
 * What comes from inside leaves outside under the first outbound SA of the file; what comes from outside goes inside only if one
 * of the inbound SAs has verified it. Everything else is dropped. Ends with SIGINT and prints what it counted.
 */
import { loadSaFile, type Nic, openNic, type SaHandle } from '../src/index.ts';

const BURST = 64;
/** Bursts between two looks at the event loop. */
const BUSY = 256;

/** Packets live in the memory of one NIC, so going to another one is a copy; a NIC's own packets can be sent back without. */
class Crossing {
  readonly #from: Nic;
  readonly #to: Nic;
  readonly #in = new Uint32Array(BURST);
  readonly #out = new Uint32Array(BURST);
  readonly #mayPass: (packet: number) => boolean;
  readonly #sa: number;

  constructor(from: Nic, to: Nic, sa: number, mayPass: (packet: number) => boolean) {
    this.#from = from;
    this.#to = to;
    this.#sa = sa;
    this.#mayPass = mayPass;
  }

  /** Moves one burst; returns how many packets came. */
  run(): number {
    const received = this.#in;
    const sending = this.#out;
    const source = this.#from.packets;
    const target = this.#to.packets;
    const n = this.#from.queues[0].rx.burst(received, BURST);
    if (n === 0) return 0;
    const room = target.allocate(sending, n);
    let filled = 0;
    for (let i = 0; i < n && filled < room; i++) {
      const p = received[i];
      if (!this.#mayPass(p)) continue;
      const q = sending[filled++];
      const at = source.offset[p];
      target.u8.set(source.u8.subarray(at, at + source.length[p]), target.offset[q]);
      target.length[q] = source.length[p];
      target.sa[q] = this.#sa;
    }
    source.free(received, n);
    const sent = this.#to.queues[0].tx.burst(sending, filled);
    target.free(sending.subarray(sent), room - sent);
    return n;
  }
}

const [inside, outside, file] = process.argv.slice(2);
if (inside === undefined || outside === undefined || file === undefined) {
  process.stderr.write('usage: forward INSIDE OUTSIDE SA_FILE\n');
  process.exit(2);
}

const lan = await openNic(inside, { ipsec: 'off' });
const wan = await openNic(outside);
try {
  const sas: SaHandle[] = [];
  for (const sa of loadSaFile(file).sas) sas.push(await wan.ipsec.addSa(sa));
  for (const sa of sas)
    process.stdout.write(`${sa.direction} ${sa.name ?? sa.spi}: ${sa.placement.where}, ${sa.placement.because}\n`);
  const out = sas.find((sa) => sa.direction === 'outbound');
  if (out === undefined) throw new Error('the SA file has no outbound SA');

  const toWan = new Crossing(lan, wan, out.handle, () => true);
  const toLan = new Crossing(wan, lan, 0, (packet) => wan.packets.sa[packet] !== 0);
  let stop = false;
  process.once('SIGINT', () => {
    stop = true;
  });
  while (!stop && lan.broken === null && wan.broken === null) {
    let moved = 0;
    for (let i = 0; i < BUSY; i++) moved += toWan.run() + toLan.run();
    // With nothing to do, rest; otherwise only let signals and timers through.
    await new Promise((resolve) => (moved === 0 ? setTimeout(resolve, 1) : setImmediate(resolve)));
  }
  for (const sa of sas) process.stdout.write(`${sa.direction} ${sa.name ?? sa.spi}: ${sa.traffic().packets} packets\n`);
} finally {
  await lan.close();
  await wan.close();
}
