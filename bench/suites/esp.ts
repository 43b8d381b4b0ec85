/**
 * `esp.encap.ENGINE.ALG.SIZE.mpps` and `esp.decap.…`: everything of RFC 4303 in tunnel mode, IPv4 in IPv4 behind an Ethernet header:
 * SA look-up, outer header, sequence number, IV, padding, trailer, ICV, replay window, counters. SIZE is the inner packet. Bursts of 32
 * go around in 512 packets; a round protects all of them and opens all of them again, and the two halves are timed on their own.
 *
 * `….ratio`: the same over the bare arithmetic of the same engine on the same bursts (`crypto.ENGINE.ALG.SIZE.mpps`).
 * `….over_node`: the same over one `node:crypto` cipher object for each packet (`crypto.node.ALG.SIZE.mpps`), for the headers nothing.
 * `esp.encap.sas64k.ratio`, `esp.decap.…`: 65536 SAs hit at random over one SA, 64 B; `….sas64k.1400B.ratio`.
 *
 * Both sides of a ratio take turns, so that what the machine does besides hits them alike.
 */
import type { EngineName } from '../../src/fallback/engines/engine.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import { type SecurityAssociationInput, validateSa } from '../../src/ipsec/validate.ts';
import { setIpv4Checksum } from '../../src/packet/checksum.ts';
import { Ethernet, EtherType, IpProtocol, Ipv4 } from '../../src/packet/fields.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { type Benchmark, type BenchSuite, type Measurement, summarize, type Workload } from '../harness.ts';
import {
  ALGORITHMS,
  type Algorithm,
  available,
  BURST,
  ENGINES,
  type EngineWorkload,
  engineWorkload,
  nodeWorkload,
  PACKETS,
  SIZES,
  STRIDE,
} from './crypto.ts';

/** Milliseconds of warming up, and of measuring. */
const WARMUP = 700;
const TIME = 1000;
const MANY_SAS = 65536;
const FIRST_SPI = 0x10000;
/** Rounds of ESP that take as long as one of `node:crypto`, which leaves cold caches and garbage behind. */
const NODE_ROUNDS = 30;

/** What the ratios are meant to reach: ESP over the bare arithmetic of its engine, over `node:crypto`, many SAs over one. */
const Goal = { openssl: 0.7, overNode: 25, manySas: 0.6 } as const;

function ratioGoal(engine: EngineName, algorithm: Algorithm, size: number): number | undefined {
  if (engine === 'openssl') return Goal.openssl;
  if (engine !== 'ipsec-mb') return undefined;
  if (algorithm === 'aes-128-gcm') return size === 64 ? 0.5 : 0.7;
  return size === 1400 && algorithm !== 'aes-256-gcm' ? 0.75 : undefined;
}

const fields: Readonly<Record<Algorithm, Pick<SecurityAssociationInput, 'aead' | 'cipher' | 'auth'>>> = {
  'aes-128-gcm': { aead: { name: 'aes-gcm', key: bytes(16), salt: bytes(4) } },
  'aes-256-gcm': { aead: { name: 'aes-gcm', key: bytes(32), salt: bytes(4) } },
  'chacha20-poly1305': { aead: { name: 'chacha20-poly1305', key: bytes(32), salt: bytes(4) } },
  'aes-128-cbc-hmac-sha256': {
    cipher: { name: 'aes-cbc', key: bytes(16) },
    auth: { name: 'hmac-sha256', key: bytes(32) },
  },
};

function bytes(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => 0x5a ^ i);
}

/** An Ethernet frame with an IPv4 packet of `size` bytes. */
function frame(size: number): Uint8Array {
  const u8 = new Uint8Array(Ethernet.length + size).fill(0x2a);
  u8[Ethernet.type] = EtherType.ipv4 >> 8;
  u8[Ethernet.type + 1] = EtherType.ipv4 & 0xff;
  const ip = Ethernet.length;
  u8.fill(0, ip, ip + Ipv4.minLength);
  u8[ip] = 0x45;
  u8[ip + Ipv4.totalLength] = size >> 8;
  u8[ip + Ipv4.totalLength + 1] = size & 0xff;
  u8[ip + Ipv4.ttl] = 64;
  u8[ip + Ipv4.protocol] = IpProtocol.udp;
  u8[ip + Ipv4.source] = 10;
  u8[ip + Ipv4.destination] = 10;
  setIpv4Checksum(u8, ip, Ipv4.minLength);
  return u8;
}

/** Packets that are protected and opened again, for ever. */
class Loop {
  readonly #memory = mapAnonymous(PACKETS * STRIDE);
  readonly #pool = new PacketPool(this.#memory, { stride: STRIDE });
  readonly #ipsec: SoftwareIpsec;
  readonly #bursts: readonly Uint32Array[];
  readonly #verdicts = new Uint8Array(BURST);
  readonly #sas: number;
  #random = 1;

  constructor(engine: EngineName | 'auto', algorithm: Algorithm, size: number, sas = 1) {
    this.#sas = sas;
    this.#ipsec = new SoftwareIpsec(this.#pool, { engine });
    const common = {
      mode: 'tunnel',
      tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
      ...fields[algorithm],
    } as const;
    for (let i = 0; i < sas; i++) {
      const spi = FIRST_SPI + i;
      this.#ipsec.add(1 + i, validateSa({ ...common, direction: 'outbound', spi }));
      this.#ipsec.add(1 + sas + i, validateSa({ ...common, direction: 'inbound', spi, replayWindow: 64 }));
    }
    const packets = new Uint32Array(PACKETS);
    this.#pool.allocate(packets, PACKETS);
    const content = frame(size);
    for (const p of packets) this.#pool.write(p, content);
    this.#bursts = Array.from({ length: PACKETS / BURST }, (_, i) => packets.slice(i * BURST, (i + 1) * BURST));
  }

  /** Says which SA each packet takes: not part of what is measured. */
  choose(): void {
    const { sa } = this.#pool;
    for (const burst of this.#bursts) {
      for (const p of burst) {
        this.#random = (Math.imul(this.#random, 1664525) + 1013904223) >>> 0;
        sa[p] = 1 + ((this.#random >>> 8) % this.#sas);
      }
    }
  }

  /** Uses each SA once: the first packet of an SA takes a slower way. */
  visitAll(): void {
    const { sa } = this.#pool;
    let next = 0;
    while (next < this.#sas) {
      for (const burst of this.#bursts) for (const p of burst) sa[p] = 1 + (next++ % this.#sas);
      this.encap();
      this.decap();
    }
  }

  encap(): void {
    for (const burst of this.#bursts) {
      this.#ipsec.protect(burst, BURST, Ethernet.length, this.#verdicts);
      this.#check('protect');
    }
  }

  decap(): void {
    for (const burst of this.#bursts) {
      this.#ipsec.unprotect(burst, BURST, Ethernet.length, this.#verdicts);
      this.#check('unprotect');
    }
  }

  close(): void {
    this.#ipsec.close();
    unmapMemory(this.#memory);
  }

  #check(what: string): void {
    const verdicts = this.#verdicts;
    let all = 0;
    for (let i = 0; i < BURST; i++) all |= verdicts[i];
    if (all !== Verdict.ok) throw new Error(`${what}: verdicts ${verdicts.join(' ')}`);
  }
}

type Half = 'encap' | 'decap';

/** One round; milliseconds of the half that is asked for. */
function roundOf(loop: Loop, half: Half): number {
  loop.choose();
  const start = performance.now();
  loop.encap();
  const middle = performance.now();
  loop.decap();
  return half === 'encap' ? middle - start : performance.now() - middle;
}

/** Calls `sample` until it has been warmed up and measured for long enough. */
function collect(sample: () => number): number[] {
  const samples: number[] = [];
  const start = performance.now();
  for (let now = start; now < start + WARMUP + TIME; now = performance.now()) {
    const value = sample();
    if (now >= start + WARMUP) samples.push(value);
  }
  return samples;
}

/** Millions of packets per second. */
function measureRate(make: () => Loop, half: Half): Measurement {
  const loop = make();
  try {
    return summarize(
      collect(() => PACKETS / (roundOf(loop, half) * 1000)),
      'Mpps',
    );
  } finally {
    loop.close();
  }
}

/** Milliseconds of bare arithmetic for as many packets as a round has. */
function bareRound(bare: Workload & Partial<EngineWorkload>): number {
  bare.prepare?.();
  const start = performance.now();
  for (let i = 0; i < PACKETS / BURST; i++) bare.run();
  return performance.now() - start;
}

/** `rounds`: how many of ESP come to one of the other. */
function measureRatio(
  make: () => Loop,
  half: Half,
  makeBare: () => Workload & Partial<EngineWorkload>,
  rounds = 1,
): Measurement {
  const loop = make();
  const bare = makeBare();
  const sample = (): number => {
    let time = 0;
    for (let i = 0; i < rounds; i++) time += roundOf(loop, half);
    return (bareRound(bare) * rounds) / time;
  };
  try {
    return summarize(collect(sample), 'ratio');
  } finally {
    bare.close?.();
    loop.close();
  }
}

function measureSas(half: Half, size: number): Measurement {
  const one = new Loop('auto', 'aes-128-gcm', size);
  const many = new Loop('auto', 'aes-128-gcm', size, MANY_SAS);
  try {
    many.visitAll();
    return summarize(
      collect(() => roundOf(one, half) / roundOf(many, half)),
      'ratio',
    );
  } finally {
    many.close();
    one.close();
  }
}

function* benchmarks(): Iterable<Benchmark> {
  for (const engine of ENGINES) {
    if (!available(engine)) continue;
    for (const algorithm of Object.keys(ALGORITHMS) as Algorithm[]) {
      for (const size of SIZES) {
        for (const half of ['encap', 'decap'] as const) {
          const make = () => new Loop(engine, algorithm, size);
          const bare = () => engineWorkload(engine, algorithm, size, half === 'encap' ? 'encrypt' : 'decrypt');
          const name = `esp.${half}.${engine}.${algorithm}.${size}B`;
          yield { name: `${name}.mpps`, measure: () => measureRate(make, half) };
          const goal = ratioGoal(engine, algorithm, size);
          yield {
            name: `${name}.ratio`,
            ...(goal !== undefined && { goal }),
            measure: () => measureRatio(make, half, bare),
          };
          if (engine === 'ipsec-mb' && algorithm === 'aes-128-gcm' && size === 64) {
            const node = () => nodeWorkload(algorithm, size);
            yield {
              name: `${name}.over_node`,
              goal: Goal.overNode,
              measure: () => measureRatio(make, half, node, NODE_ROUNDS),
            };
          }
        }
      }
    }
  }
  for (const half of ['encap', 'decap'] as const) {
    const goal = Goal.manySas;
    yield { name: `esp.${half}.sas64k.ratio`, goal, measure: () => measureSas(half, 64) };
    yield { name: `esp.${half}.sas64k.1400B.ratio`, goal, measure: () => measureSas(half, 1400) };
  }
}

export const suite: BenchSuite = { name: 'esp', benchmarks };
