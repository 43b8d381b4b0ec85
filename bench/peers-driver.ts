/**
 * The driver's side of `peers.ts`, in a process of its own: sends, receives or forwards frames of 64 bytes at a vhost-user port until its stdin
 * ends. `node peers-driver.js ADDRESS tx|rx|forward split|packed QUEUE_SIZE`; prints `ready` when it runs.
 *
 * It does what DPDK's testpmd does in the modes txonly (writes the headers into each packet), rxonly and macswap, in bursts of 32.
 */
import { Feature, type Nic, openNic } from '../src/index.ts';

const BURST = 32;
const FRAME_BYTES = 64;
/** Ethernet, IPv4 and UDP headers: 42 bytes, and two of payload. */
const HEADER_BYTES = 44;
/** Bursts between two looks at the event loop. */
const BURSTS_PER_TURN = 512;

/** The headers of an Ethernet frame with an IPv4 UDP packet, in 48 bytes. */
function headers(): ArrayBuffer {
  const bytes = new Uint8Array(HEADER_BYTES + 4);
  bytes.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0, 0, 50, 0, 1, 0, 0, 64, 17, 0x66, 0xb9]);
  bytes.set([10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 9, 0, 30], 26);
  return bytes.buffer;
}

type Round = () => void;

function transmitter(nic: Nic): Round {
  const { packets: pool, queues } = nic;
  const { tx } = queues[0];
  const { offset, length, u8, u32 } = pool;
  const burst = new Uint32Array(BURST);
  // Eight bytes at a time: what is written waits in a queue of the processor for its cache line, and the fewer pieces it has the more
  // packets fit.
  const f64 = new Float64Array(u8.buffer, u8.byteOffset, u8.length >>> 3);
  const [h0, h1, h2, h3, h4] = new Float64Array(headers());
  if ([h0, h1, h2, h3, h4].some(Number.isNaN)) throw new Error('not every bit pattern survives as a number');
  const h5 = new Uint32Array(headers())[10];
  let held = 0;
  return () => {
    // hot:
    if (held === 0) {
      held = pool.allocate(burst, BURST);
      for (let i = 0; i < held; i++) {
        const p = burst[i];
        const at = offset[p] >>> 3;
        f64[at] = h0;
        f64[at + 1] = h1;
        f64[at + 2] = h2;
        f64[at + 3] = h3;
        f64[at + 4] = h4;
        u32[2 * at + 10] = h5;
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
