/**
 * The matrix of IPsec interoperability with Linux: transforms, modes, families, options. An SA is written as in an SA file, so
 * that our side validates the text that the kernel's commands are made from.
 */
import type { SecurityAssociationInput } from '../../src/ipsec/validate.ts';

export type Family = 4 | 6;
export type Algorithms = Pick<SecurityAssociationInput, 'protocol' | 'aead' | 'cipher' | 'auth'>;

export interface InteropCase {
  /** Also the name of its check: `esp aes-128-gcm-16 tunnel 4in4`. */
  readonly name: string;
  readonly algorithms: Algorithms;
  readonly mode: 'tunnel' | 'transport';
  readonly outer: Family;
  readonly inner: Family;
  readonly esn: boolean;
  readonly natTraversal: boolean;
  readonly replayWindow: number;
}

/**
 * The two ends: `ours` is driven by our process, `kernel` belongs to Linux. Their tunnels end at `gateway`; applications have addresses that begin
 * with `hosts`.
 */
export const ENDS = {
  ours: { gateway: { 4: '192.0.2.1', 6: '2001:db8:2::1' }, hosts: { 4: '10.1.0.', 6: '2001:db8:a1::' } },
  kernel: { gateway: { 4: '192.0.2.2', 6: '2001:db8:2::2' }, hosts: { 4: '10.2.0.', 6: '2001:db8:a2::' } },
} as const;
export type End = keyof typeof ENDS;

/** What the addresses of the applications of case `index` end with: each case has two hosts of its own, so that several can run side by side. */
export function hostNumber(index: number): number {
  if (index > 0xfd) throw new Error('there are no more addresses');
  return index + 1;
}

/** Where the application of case `index` at `end` has its address. In transport mode the SAs are between these, in tunnel mode they go through. */
export function applicationAddress(end: End, index: number, family: Family): string {
  return `${ENDS[end].hosts[family]}${hostNumber(index).toString(family === 4 ? 10 : 16)}`;
}

/** The addresses between which the SA of case `index` is that carries packets from `from`. */
export function saEnds(
  { mode, outer }: InteropCase,
  index: number,
  from: End,
): { readonly source: string; readonly destination: string } {
  const to = from === 'ours' ? 'kernel' : 'ours';
  const address = (end: End) => (mode === 'tunnel' ? ENDS[end].gateway[outer] : applicationAddress(end, index, outer));
  return { source: address(from), destination: address(to) };
}

export const NAT_T_PORT = 4500;

/** Different bytes for every use, the same ones in every run. */
function bytes(length: number, seed: number): string {
  return Array.from({ length }, (_, i) => ((i * 29 + seed * 83 + 5) & 0xff).toString(16).padStart(2, '0')).join('');
}

function gcm(bits: number, icvLength: number): [string, Algorithms] {
  const aead = { name: 'aes-gcm', key: bytes(bits / 8, bits), salt: bytes(4, 1), icvLength } as const;
  return [`esp aes-${bits}-gcm-${icvLength}`, { protocol: 'esp', aead }];
}

const HMAC = {
  'hmac-sha1': { key: 20, icvLength: 12 },
  'hmac-sha256': { key: 32, icvLength: 16 },
  'hmac-sha384': { key: 48, icvLength: 24 },
  'hmac-sha512': { key: 64, icvLength: 32 },
  'aes-xcbc': { key: 16, icvLength: 12 },
  'aes-cmac': { key: 16, icvLength: 12 },
} as const;
type Mac = keyof typeof HMAC;

const auth = (name: Mac) => ({ name, key: bytes(HMAC[name].key, 7), icvLength: HMAC[name].icvLength });

function cbc(bits: number, mac: Mac): [string, Algorithms] {
  const cipher = { name: 'aes-cbc', key: bytes(bits / 8, bits + 1) } as const;
  return [`esp aes-${bits}-cbc ${mac}`, { protocol: 'esp', cipher, auth: auth(mac) }];
}

function ctr(bits: number, mac: Mac): [string, Algorithms] {
  const cipher = { name: 'aes-ctr', key: bytes(bits / 8, bits + 2), salt: bytes(4, 9) } as const;
  return [`esp aes-${bits}-ctr ${mac}`, { protocol: 'esp', cipher, auth: auth(mac) }];
}

const CHACHA: [string, Algorithms] = [
  'esp chacha20-poly1305',
  { protocol: 'esp', aead: { name: 'chacha20-poly1305', key: bytes(32, 3), salt: bytes(4, 4), icvLength: 16 } },
];
const CCM: [string, Algorithms] = [
  'esp aes-128-ccm-16',
  { protocol: 'esp', aead: { name: 'aes-ccm', key: bytes(16, 3), salt: bytes(3, 4), icvLength: 16 } },
];
const NULL: [string, Algorithms] = [
  'esp null hmac-sha256',
  { protocol: 'esp', cipher: { name: 'null' }, auth: auth('hmac-sha256') },
];

function gmac(bits: number): [string, Algorithms] {
  const aead = { name: 'aes-gmac', key: bytes(bits / 8, bits + 4), salt: bytes(4, 5), icvLength: 16 } as const;
  return [`esp aes-${bits}-gmac`, { protocol: 'esp', aead }];
}

function ah(mac: Mac): [string, Algorithms] {
  return [`ah ${mac}`, { protocol: 'ah', auth: auth(mac) }];
}

/** Transforms by the scenario that runs them, so that the scenarios take about the same time. */
const TRANSFORMS = {
  aead: [gcm(128, 16), gcm(128, 12), gcm(128, 8), gcm(256, 16), gcm(256, 12), gcm(256, 8), CHACHA, CCM],
  cipher: [
    cbc(128, 'hmac-sha1'),
    cbc(128, 'hmac-sha256'),
    cbc(256, 'hmac-sha384'),
    cbc(256, 'hmac-sha512'),
    cbc(128, 'aes-xcbc'),
    ctr(128, 'hmac-sha256'),
    ctr(256, 'hmac-sha512'),
    NULL,
  ],
  integrity: [
    gmac(128),
    ah('hmac-sha1'),
    ah('hmac-sha256'),
    ah('hmac-sha384'),
    ah('hmac-sha512'),
    ah('aes-xcbc'),
    gmac(256),
  ],
} as const;
export type MatrixPart = keyof typeof TRANSFORMS | 'options';

const PLAIN = { esn: false, natTraversal: false, replayWindow: 64 } as const;

function named(label: string, algorithms: Algorithms, rest: Omit<InteropCase, 'name' | 'algorithms'>): InteropCase {
  const families = rest.mode === 'tunnel' ? `${rest.inner}in${rest.outer}` : `ipv${rest.outer}`;
  const options = [
    rest.esn ? ' esn' : '',
    rest.natTraversal ? ' nat-t' : '',
    rest.replayWindow === PLAIN.replayWindow ? '' : ` window ${rest.replayWindow}`,
  ].join('');
  return { name: `${label} ${rest.mode} ${families}${options}`, algorithms, ...rest };
}

/**
 * What a transform meets in tunnel mode (families outside and inside) and in transport mode: once IPv4 outside and once IPv6.
 * Families are a matter of headers, not of transforms: any four transforms in a row go through all of them.
 */
const FAMILIES = [
  { tunnel: { outer: 4, inner: 4 }, transport: { outer: 6, inner: 6 } },
  { tunnel: { outer: 6, inner: 6 }, transport: { outer: 4, inner: 4 } },
  { tunnel: { outer: 6, inner: 4 }, transport: { outer: 4, inner: 4 } },
  { tunnel: { outer: 4, inner: 6 }, transport: { outer: 6, inner: 6 } },
] as const;

/** All of `transforms` in tunnel and in transport mode. */
function transformCases(transforms: readonly [string, Algorithms][]): InteropCase[] {
  return transforms.flatMap(([label, algorithms], i) => {
    const { tunnel, transport } = FAMILIES[i % FAMILIES.length];
    return [
      named(label, algorithms, { mode: 'tunnel', ...tunnel, ...PLAIN }),
      named(label, algorithms, { mode: 'transport', ...transport, ...PLAIN }),
    ];
  });
}

/**
 * ESN, NAT traversal and replay windows, on one transform of each kind. Every two of mode, ESN and window 32 or 4096 meet, and
 * so do NAT traversal (ESP only, RFC 3948; over IPv4 only) and each mode.
 */
function optionCases(): InteropCase[] {
  const kinds = [gcm(128, 16), cbc(128, 'hmac-sha256'), ah('hmac-sha256')];
  const tunnel = { mode: 'tunnel', outer: 4, inner: 4, ...PLAIN } as const;
  const transport = { mode: 'transport', outer: 4, inner: 4, ...PLAIN } as const;
  return kinds.flatMap(([label, algorithms]) => {
    const chosen: Omit<InteropCase, 'name' | 'algorithms'>[] = [
      { ...tunnel, esn: true, replayWindow: 4096 },
      { ...transport, esn: true, replayWindow: 32 },
      { ...tunnel, replayWindow: 32 },
      { ...transport, outer: 6, inner: 6, replayWindow: 4096 },
    ];
    if (algorithms.protocol === 'esp') {
      chosen.push({ ...tunnel, natTraversal: true, esn: true }, { ...transport, natTraversal: true });
    }
    return chosen.map((rest) => named(label, algorithms, rest));
  });
}

/** `software`: QEMU's NIC has no IPsec. `inline`: the device processes the SAs that it can. */
export type Where = 'software' | 'inline';

/** `inline`: what the device can do, and one case of what it cannot, so that both kinds of SA meet on one NIC. */
export function matrixPart(part: MatrixPart, where: Where): readonly InteropCase[] {
  if (part === 'options') return optionCases();
  const all: readonly [string, Algorithms][] = TRANSFORMS[part];
  if (where === 'software') return transformCases(all);
  const can = all.filter(([, algorithms]) => isExpressible({ algorithms }));
  const cannot = all.filter(([, algorithms]) => !isExpressible({ algorithms }));
  return [...transformCases(can), ...transformCases(cannot.slice(0, 1)).slice(0, 1)];
}

/** Bytes that an SA object has for a key, and the only ICV that it can mean for an AEAD (docs/spec-notes.md, 2). */
const InlineLimit = { keyLength: 32, aeadIcv: 16 } as const;

/** Whether an SA object can express the SAs of `item`; if not, they run in software also where the device does IPsec. */
export function isExpressible({ algorithms: { aead, auth: mac } }: Pick<InteropCase, 'algorithms'>): boolean {
  if (aead !== undefined) return aead.icvLength === InlineLimit.aeadIcv;
  return typeof mac?.key === 'string' && mac.key.length / 2 <= InlineLimit.keyLength;
}

/** SPIs of the two SAs of case `index` of a part: no two alike in one run. */
export function spiOf(index: number, from: End): number {
  return 0x1000 + 2 * index + (from === 'ours' ? 0 : 1);
}

/** The SA of case `index` that carries packets from `from` to the other end, as our side is given it. */
export function ourSa(item: InteropCase, index: number, from: End): SecurityAssociationInput {
  const { mode, esn, natTraversal, replayWindow, algorithms } = item;
  return {
    name: `${from}-${index}`,
    direction: from === 'ours' ? 'outbound' : 'inbound',
    mode,
    spi: spiOf(index, from),
    ...algorithms,
    ...keyed(algorithms, index, from),
    ...(mode === 'tunnel' ? { tunnel: saEnds(item, index, from) } : {}),
    ...(natTraversal ? { udpEncap: { sourcePort: NAT_T_PORT, destinationPort: NAT_T_PORT } } : {}),
    options: { esn },
    replayWindow,
  };
}

/** The same algorithms with a key of this SA's own: one key never serves two SAs. */
function keyed({ aead, cipher, auth: mac }: Algorithms, index: number, from: End): Algorithms {
  const fresh = <T extends { key?: unknown }>(field: T): T => {
    if (typeof field.key !== 'string') return field;
    const mark = (2 * index + (from === 'ours' ? 0 : 1) + 1).toString(16).padStart(4, '0');
    return { ...field, key: `${mark}${field.key.slice(mark.length)}` };
  };
  return {
    ...(aead === undefined ? {} : { aead: fresh(aead) }),
    ...(cipher === undefined ? {} : { cipher: fresh(cipher) }),
    ...(mac === undefined ? {} : { auth: fresh(mac) }),
  };
}
