/**
 * The driver's side of `peers.ts`, in a process of its own: sends, receives or forwards frames of 64 bytes at a vhost-user port until its stdin
 * ends. `node peers-driver.js ADDRESS tx|rx|forward split|packed QUEUE_SIZE`; prints `ready` when it runs.
 *
 * It does what DPDK's testpmd does in the modes txonly (writes the headers into each packet), rxonly and macswap, in bursts of 32.
 */
import { Feature, type Nic, openNic } from '../src/index.ts';

const BURST = 32;
const FRAME_BYTES = 64;
/** Ethernet, IPv4 and UDP headers. */
const HEADER_WORDS = 11;
/** Bursts between two looks at the event loop. */
const BURSTS_PER_TURN = 512;

/** The headers of an Ethernet frame with an IPv4 UDP packet. */
function headerWords(): Uint32Array {
  const bytes = new Uint8Array(4 * HEADER_WORDS);
  bytes.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0, 0, 50, 0, 1, 0, 0, 64, 17, 0x66, 0xb9]);
  bytes.set([10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 9, 0, 30], 26);
  return new Uint32Array(bytes.buffer);
}

type Round = () => void;

function transmitter(nic: Nic): Round {
  const { packets: pool, queues } = nic;
  const { tx } = queues[0];
  const { offset, length, u32 } = pool;
  const burst = new Uint32Array(BURST);
  const words = headerWords();
  let held = 0;
  return () => {
    // hot:
    if (held === 0) {
      held = pool.allocate(burst, BURST);
      for (let i = 0; i < held; i++) {
        const p = burst[i];
        const at = offset[p] >>> 2;
        for (let w = 0; w < HEADER_WORDS; w++) u32[at + w] = words[w];
        length[p] = FRAME_BYTES;
      }
    }
    const sent = tx.burst(burst, held);
    if (sent < held) burst.copyWithin(0, sent, held);
    held -= sent;
  };
}

function receiver(nic: Nic): Round {
  const { packets: pool, queues } = nic;
  const { rx } = queues[0];
  const burst = new Uint32Array(BURST);
  return () => {
    // hot:
    const n = rx.burst(burst, BURST);
    if (n !== 0) pool.free(burst, n);
  };
}

function forwarder(nic: Nic): Round {
  const { packets: pool, queues } = nic;
  const { rx, tx } = queues[0];
  const { offset, u32 } = pool;
  const burst = new Uint32Array(BURST);
  return () => {
    // hot:
    const n = rx.burst(burst, BURST);
    if (n === 0) return;
    for (let i = 0; i < n; i++) {
      // The addresses are twelve bytes from a word on: they change places half a word at a time.
      const at = offset[burst[i]] >>> 2;
      const a = u32[at];
      const b = u32[at + 1];
      const c = u32[at + 2];
      u32[at] = (b >>> 16) | (c << 16);
      u32[at + 1] = (c >>> 16) | (a << 16);
      u32[at + 2] = (a >>> 16) | (b << 16);
    }
    const sent = tx.burst(burst, n);
    if (sent < n) pool.free(burst.subarray(sent), n - sent);
  };
}

const MODES: Readonly<Record<string, (nic: Nic) => Round>> = { tx: transmitter, rx: receiver, forward: forwarder };

async function main([address, mode, ring, queueSize]: readonly string[]): Promise<void> {
  const make = MODES[mode];
  if (make === undefined || (ring !== 'split' && ring !== 'packed')) throw new Error(`no mode ${mode} ${ring}`);
  const decline = [Feature.MRG_RXBUF];
  await using nic = await openNic(address, { ring, queueSize: Number(queueSize), ipsec: 'off', decline });
  const round = make(nic);
  let stop = false;
  process.stdin.on('end', () => {
    stop = true;
  });
  process.stdin.resume();
  process.stdout.write('ready\n');
  while (!stop) {
    for (let i = 0; i < BURSTS_PER_TURN; i++) round();
    if (nic.broken !== null) throw nic.broken;
    await new Promise((resolve) => setImmediate(resolve));
  }
}

await main(process.argv.slice(2));
