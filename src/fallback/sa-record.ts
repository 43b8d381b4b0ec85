/**
 * From a `SecurityAssociation` to the record that the data path reads (`sa-table.ts`), and carrying state over when an SA
 * is modified. Nothing here is hot; nothing here keeps a key.
 */
import type { SecurityAssociation, Selector } from '../ipsec/sa.ts';
import { Ah, IpProtocol } from '../packet/fields.ts';
import type { Transform } from './engines/engine.ts';
import { packetSizes } from './esp.ts';
import { originalAddress } from './nat.ts';
import { MaxPacket } from './pmtu.ts';
import { carryWindow, startWindow, windowBlocks } from './replay.ts';
import { RECORD, SaKind, type SaTable, SaWord, Sizes } from './sa-table.ts';
import { isRestrictive } from './selector.ts';
import { writeTemplate } from './tunnel.ts';

const MASK32 = 0xffffffffn;
const SEQUENCE_END = 1n << 64n;

function kindOf(sa: SecurityAssociation, transform: Transform, ivLength: number): number {
  const { options } = sa;
  let kind: number = sa.direction === 'outbound' ? SaKind.outbound : SaKind.inbound;
  kind |= sa.protocol === 'esp' ? SaKind.esp : SaKind.ah;
  const set = (bit: number, on: boolean): void => {
    if (on) kind |= bit;
  };
  set(SaKind.tunnel, sa.mode === 'tunnel');
  set(SaKind.outer6, sa.tunnel?.source.length === 16);
  set(SaKind.udp, sa.udpEncap !== undefined);
  set(SaKind.esn, options.esn);
  set(SaKind.counterIv, ivLength === 8 && transform.cipher !== '3des-cbc');
  set(SaKind.ccm, transform.cipher === 'aes-ccm');
  set(SaKind.selector, sa.direction === 'inbound' && isRestrictive(sa.selector));
  if (sa.mode === 'tunnel') {
    set(SaKind.copyDscp, options.copyDscp);
    set(SaKind.copyDf, options.copyDf && sa.tunnel?.source.length === 4);
    set(SaKind.decrementTtl, options.decrementTtl);
    set(SaKind.ecn, options.ecn);
    set(SaKind.df, sa.tunnel?.df ?? false);
  }
  // ESP tunnels with an AEAD and nothing unusual.
  const unusual = SaKind.udp | SaKind.ccm | SaKind.decrementTtl | SaKind.selector;
  const simple = sa.protocol === 'esp' && sa.mode === 'tunnel' && transform.family === 'aead' && sa.tfcPadding === 0;
  set(SaKind.simple, simple && (kind & (unusual | (sa.direction === 'inbound' ? SaKind.ecn : 0))) === 0);
  return kind;
}

/** The salt as a word in memory order: 4 bytes, or 3 for CCM. */
function saltOf(sa: SecurityAssociation): number {
  const salt = sa.aead?.salt ?? sa.cipher?.salt ?? sa.auth?.salt;
  let word = 0;
  salt?.forEach((byte, i) => {
    word |= byte << (8 * i);
  });
  return word >>> 0;
}

/** Destination of an inbound SA, and which of its bits count; nothing is any. */
function writeDestination(words: Int32Array, record: number, sa: SecurityAssociation): void {
  const address = sa.tunnel?.destination ?? sa.selector.destination?.address;
  if (address === undefined) return;
  const bits = sa.tunnel === undefined ? (sa.selector.destination?.length ?? 0) : address.length * 8;
  const bytes = new Uint8Array(words.buffer, words.byteOffset + 4 * (record + SaWord.destination), 32);
  for (let i = 0; i < address.length; i++) {
    const mask = 0xff00 >>> Math.min(8, Math.max(0, bits - 8 * i));
    bytes[i] = address[i] & mask;
    bytes[16 + i] = mask;
  }
  words[record + SaWord.destinationBits] = ((address.length === 4 ? 4 : 6) << 8) | bits;
  if (address.length === 4 && bits === 32) {
    words[record + SaWord.kind] |= SaKind.destination4;
    words[record + SaWord.destination4] = words[record + SaWord.destination];
  }
}

/** Largest packet on the wire without a configured MTU. */
export function wireLimit(sa: SecurityAssociation): number {
  return sa.tunnel?.source.length === 16 ? MaxPacket.ipv6 : MaxPacket.ipv4;
}

/**
 * Fills the record of `slot`, which is zero, with everything but the group and the context. The sequence number
 * starts where `sa.initial` says.
 */
export function writeRecord(
  table: SaTable,
  slot: number,
  handle: number,
  sa: SecurityAssociation,
  transform: Transform,
): void {
  const sizes = packetSizes(transform, sa.protocol);
  const record = slot * RECORD;
  const outbound = sa.direction === 'outbound';
  const base = outbound ? -1 : allocateWindow(table, sa);
  const { words } = table;
  const spi = new Uint8Array([sa.spi >>> 24, sa.spi >>> 16, sa.spi >>> 8, sa.spi]);
  words[record + SaWord.kind] = kindOf(sa, transform, sizes.iv);
  words[record + SaWord.handle] = handle;
  words[record + SaWord.spi] = spi[0] | (spi[1] << 8) | (spi[2] << 16) | (spi[3] << 24);
  words[record + SaWord.salt] = saltOf(sa);
  const ah = sa.protocol === 'ah' ? Ah.length + sizes.iv + sizes.icv : 0;
  words[record + SaWord.sizes] =
    ((sizes.alignment - 1) << Sizes.padMask) | (sizes.iv << Sizes.iv) | (sizes.icv << Sizes.icv) | (ah << Sizes.ah);
  words[record + SaWord.sequenceLow] = Number(sa.initial.sequence & MASK32);
  words[record + SaWord.sequenceHigh] = Number((sa.initial.sequence >> 32n) & MASK32);
  if (outbound) {
    words[record + SaWord.mtu] = wireLimit(sa);
    words[record + SaWord.tfc] = sa.mode === 'tunnel' ? sa.tfcPadding : 0;
    if (sa.tunnel !== undefined) {
      const esp = sa.protocol === 'esp' ? IpProtocol.esp : IpProtocol.ah;
      writeTemplate(words, record, sa.tunnel, sa.udpEncap === undefined ? esp : IpProtocol.udp);
    }
    writeInitialIv(words, record, sa);
    if (sa.udpEncap !== undefined) {
      const { sourcePort: s, destinationPort: d } = sa.udpEncap;
      words[record + SaWord.ports] = (s >>> 8) | ((s & 0xff) << 8) | ((d >>> 8) << 16) | ((d & 0xff) << 24);
    }
  } else {
    words[record + SaWord.arrived] = handle;
    words[record + SaWord.window] = sa.replayWindow;
    words[record + SaWord.windowBase] = base;
    words[record + SaWord.windowMask] = sa.replayWindow === 0 ? 0 : windowBlocks(sa.replayWindow) - 1;
    if (sa.replayWindow !== 0) restartWindow(table, slot);
    writeDestination(words, record, sa);
    words[record + SaWord.originalSource] = originalAddress(sa.udpEncap?.originalSource);
    words[record + SaWord.originalDestination] = originalAddress(sa.udpEncap?.originalDestination);
  }
}

function allocateWindow(table: SaTable, sa: SecurityAssociation): number {
  return sa.replayWindow === 0 ? 0 : table.allocateWindow(windowBlocks(sa.replayWindow));
}

function restartWindow(table: SaTable, slot: number): void {
  const { words, windows } = table;
  const record = slot * RECORD;
  startWindow(
    windows,
    words[record + SaWord.windowBase],
    words[record + SaWord.windowMask],
    words[record + SaWord.sequenceLow] >>> 0,
  );
}

/** Counter modes: the explicit IV is the sequence number plus a constant, so that the first packet carries `initial.iv`. */
function writeInitialIv(words: Int32Array, record: number, sa: SecurityAssociation): void {
  const { iv, sequence } = sa.initial;
  if (iv === undefined) return;
  if ((words[record + SaWord.kind] & SaKind.counterIv) === 0) {
    words[record + SaWord.kind] |= SaKind.givenIv;
    return;
  }
  let value = 0n;
  for (const byte of iv) value = (value << 8n) | BigInt(byte);
  const difference = BigInt.asUintN(64, value - sequence);
  words[record + SaWord.ivLow] = Number(difference & MASK32);
  words[record + SaWord.ivHigh] = Number(difference >> 32n);
}

/**
 * Sequence number and window of the SA in slot `from` go on in slot `to`: for a change that leaves the key of the authenticator. With `sameNonces`
 * IVs go on too; under another key they are the sequence numbers from now on.
 */
export function carrySequence(table: SaTable, from: number, to: number, sameNonces: boolean): void {
  const { words, windows } = table;
  const a = from * RECORD;
  const b = to * RECORD;
  words[b + SaWord.sequenceLow] = words[a + SaWord.sequenceLow];
  words[b + SaWord.sequenceHigh] = words[a + SaWord.sequenceHigh];
  if ((words[b + SaWord.kind] & SaKind.outbound) !== 0) {
    words[b + SaWord.ivLow] = sameNonces ? words[a + SaWord.ivLow] : 0;
    words[b + SaWord.ivHigh] = sameNonces ? words[a + SaWord.ivHigh] : 0;
    words[b + SaWord.kind] &= ~SaKind.givenIv;
    return;
  }
  words[b + SaWord.failures] = words[a + SaWord.failures];
  if (words[b + SaWord.window] === 0) return;
  if (words[a + SaWord.window] === 0) {
    restartWindow(table, to);
    return;
  }
  carryWindow(
    windows,
    words[a + SaWord.windowBase],
    words[a + SaWord.windowMask],
    words[b + SaWord.windowBase],
    words[b + SaWord.windowMask],
    words[a + SaWord.sequenceLow] >>> 0,
  );
}

/** The sequence number in the record: outbound the next one, 2^64 when all have been used; inbound the highest accepted. */
export function sequenceOf(table: SaTable, slot: number): bigint {
  const { words } = table;
  const record = slot * RECORD;
  const high = BigInt(words[record + SaWord.sequenceHigh] >>> 0);
  const number = (high << 32n) | BigInt(words[record + SaWord.sequenceLow] >>> 0);
  // It starts with 1 at least, so 0 is what follows the last number.
  return number === 0n && (words[record] & SaKind.outbound) !== 0 ? SEQUENCE_END : number;
}

/** The inbound SA in `slot` accepts nothing up to `sequence`, nor up to where it was to start. */
export function startBehind(table: SaTable, slot: number, sequence: bigint): void {
  const { words } = table;
  const record = slot * RECORD;
  if (sequence <= sequenceOf(table, slot)) return;
  words[record + SaWord.sequenceLow] = Number(sequence & MASK32);
  words[record + SaWord.sequenceHigh] = Number(sequence >> 32n);
  if (words[record + SaWord.window] !== 0) restartWindow(table, slot);
}

/** Gives back what `writeRecord` took. */
export function releaseRecord(table: SaTable, slot: number): void {
  const { words } = table;
  const record = slot * RECORD;
  if ((words[record + SaWord.kind] & SaKind.inbound) !== 0 && words[record + SaWord.window] !== 0) {
    table.releaseWindow(words[record + SaWord.windowBase], words[record + SaWord.windowMask] + 1);
  }
  table.release(slot);
}

/** The selector to keep for an SA: a copy, since the caller's may change. */
export function copySelector(selector: Selector): Selector {
  return structuredClone(selector);
}
