import { afterEach, describe, expect, it } from 'vitest';
import {
  createFlowActionEsp,
  EspFlag,
  EspMask,
  type FlowActionEspAttributes,
  FlowSpecType,
  FlowTable,
  type Nic,
  type SaHandle,
  Verdict,
} from '../../src/index.ts';
import { capture, cleanUp, freshKey, openPair, type Received, receive, until } from './support.ts';

afterEach(cleanUp);

const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);
const LINK = 14;
const draft = { wire: 'rfc-2025-01', nic: { wire: 'rfc-2025-01' } } as const;

function keymat() {
  return { salt: Uint8Array.of(1, 2, 3, 4), icvLen: 16, aesKey: Buffer.from(freshKey(), 'hex') };
}

const encap = [{ type: FlowSpecType.ipv4, val: { srcIp: '192.0.2.1', dstIp: '192.0.2.2' } }] as const;
const { fullOffload, encrypt, decrypt, transport } = EspFlag;

/** Both ends of an action in full offload. */
function ends(spi: number, material = keymat()): [FlowActionEspAttributes, FlowActionEspAttributes] {
  const common = { keymat: material, espEncap: encap };
  return [
    { espAttr: { spi, flags: fullOffload | encrypt }, ...common },
    { espAttr: { spi, flags: fullOffload | decrypt }, replay: { size: 64 }, ...common },
  ];
}

/** Sends frames as the table says; throws when it says that one has to be dropped. */
async function transmit(nic: Nic, table: FlowTable, frames: readonly Uint8Array[]): Promise<void> {
  const [{ tx }] = nic.queues;
  const packets = new Uint32Array(frames.length);
  const verdicts = new Uint8Array(frames.length);
  expect(nic.packets.allocate(packets, frames.length)).toBe(frames.length);
  frames.forEach((frame, i) => {
    nic.packets.write(packets[i], frame);
  });
  table.egress(packets, frames.length, LINK, new Uint8Array(frames.length).fill(6), verdicts);
  expect([...verdicts].filter((one) => one !== Verdict.ok)).toEqual([]);
  let sent = 0;
  await until(
    () => {
      tx.reclaim();
      sent += tx.burst(packets.subarray(sent), frames.length - sent);
      return sent === frames.length;
    },
    () => 'the ring stays full',
  );
}

describe('actions of the verbs on a device', () => {
  it.each([
    ['virtio-1.4', {}],
    ['the draft', draft],
  ] as const)(
    'in full offload protect what their flows match and change it all at one point: %s',
    async (_name, setup) => {
      const { a, b, wire } = await openPair(setup, setup);
      const [outgoing, incoming] = ends(0x5001);
      const action = await createFlowActionEsp(a, outgoing);
      const inbound = await createFlowActionEsp(b, incoming);
      expect([action.placement.where, inbound.placement.where]).toEqual(['inline', 'inline']);
      const table = new FlowTable(a);
      const ports = [80, 443];
      const specs = (port: object) =>
        [
          { type: FlowSpecType.ipv4, val: {} },
          { type: FlowSpecType.tcp, val: port },
        ] as const;
      table.create({ direction: 'egress', specs: specs({ dstPort: 80 }), action });
      table.create({ direction: 'egress', specs: specs({ srcPort: 80 }), action });
      const web = ip.filter(
        (frame) => frame[23] === 6 && ports.some((port) => [34, 36].some((at) => frame.readUInt16BE(at) === port)),
      );
      expect(web.length).toBeGreaterThan(30);
      const through = async (frames: readonly Buffer[], handle: () => SaHandle | null) => {
        const [, received] = await Promise.all([transmit(a, table, frames), receive(b, frames.length)]);
        expect(received.map(({ frame }) => frame.toString('hex'))).toEqual(
          frames.map((frame) => frame.toString('hex')),
        );
        expect(received.every(({ sa }) => sa === handle()?.handle)).toBe(true);
      };
      await through(web.slice(0, 15), () => inbound.sa);

      const [next, nextIn] = ends(0x5002);
      await inbound.modify(nextIn);
      await action.modify(next);
      await through(web.slice(15, 30), () => inbound.sa);
      const spis = wire.frames.map(({ frame }) => frame.readUInt32BE(LINK + 20));
      expect(spis).toEqual([...Array(15).fill(0x5001), ...Array(15).fill(0x5002)]);
      const numbers = wire.frames.map(({ frame }) => frame.readUInt32BE(LINK + 24));
      expect(numbers).toEqual([...Array(30).keys()].map((i) => (i % 15) + 1));

      // What is refused leaves everything as it is.
      const farther = { type: FlowSpecType.ipv4Ext, val: { ...encap[0].val, ttl: 9 } } as const;
      const asked = action.modify({ espEncap: [farther] });
      await expect(asked).rejects.toThrow(expect.objectContaining({ code: 'NONCE_REUSE' }));
      await through(web.slice(0, 5), () => inbound.sa);
      expect(a.ipsec.list()).toHaveLength(1);
      expect(b.ipsec.list()).toHaveLength(1);
    },
  );

  it('in inline crypto make and open packets that an SA on the other side opens and makes', async () => {
    const { a, b, wire } = await openPair({}, {});
    const material = keymat();
    const action = await createFlowActionEsp(a, {
      espAttr: { flags: encrypt | transport },
      keymat: material,
      compMask: EspMask.esn,
      esn: 0,
    });
    const table = new FlowTable(a);
    const esp = [
      { type: FlowSpecType.ipv4, val: {} },
      { type: FlowSpecType.esp, val: { spi: 0x6001 } },
    ] as const;
    table.create({ direction: 'egress', specs: esp, action });
    const inn = await b.ipsec.addSa(
      {
        direction: 'inbound',
        mode: 'transport',
        spi: 0x6001,
        aead: { name: 'aes-gcm', key: material.aesKey, salt: material.salt },
        options: { esn: true },
      },
      { require: 'inline' },
    );
    const tcp = ip.filter((frame) => frame[23] === 6).slice(0, 10);
    await transmit(a, table, tcp.map(withEspHeader));
    const received = await receive(b, tcp.length);
    expect(received.filter(({ sa }) => sa === inn.handle)).toHaveLength(tcp.length);
    received.forEach(({ frame }: Received, i) => {
      expect(frame.subarray(LINK + 20).toString('hex')).toBe(tcp[i].subarray(LINK + 20).toString('hex'));
    });

    // The other way: what an SA of A's device made, B opens with the arithmetic alone.
    await inn.remove();
    const back = keymat();
    const out = await a.ipsec.addSa(
      {
        direction: 'outbound',
        mode: 'transport',
        spi: 0x6002,
        aead: { name: 'aes-gcm', key: back.aesKey, salt: back.salt },
      },
      { require: 'inline' },
    );
    const opening = await createFlowActionEsp(b, { espAttr: { flags: decrypt | transport }, keymat: back });
    const tableB = new FlowTable(b);
    const specs = [
      { type: FlowSpecType.ipv4, val: {} },
      { type: FlowSpecType.esp, val: { spi: 0x6002 } },
    ] as const;
    tableB.create({ direction: 'ingress', specs, action: opening });
    wire.frames.length = 0;
    const packets = new Uint32Array(tcp.length);
    a.packets.allocate(packets, tcp.length);
    tcp.forEach((frame, i) => {
      a.packets.write(packets[i], frame);
      a.packets.sa[packets[i]] = out.handle;
    });
    expect(a.queues[0].tx.burst(packets, tcp.length)).toBe(tcp.length);
    const arrived = new Uint32Array(tcp.length);
    let n = 0;
    await until(
      () => {
        n += b.queues[0].rx.burst(arrived.subarray(n), tcp.length - n);
        return n === tcp.length;
      },
      () => `${n} packets arrived`,
    );
    const nextHeaders = new Uint8Array(n);
    const verdicts = new Uint8Array(n);
    tableB.ingress(arrived, n, LINK, nextHeaders, verdicts);
    expect(new Set(verdicts)).toEqual(new Set([Verdict.ok]));
    expect(new Set(nextHeaders)).toEqual(new Set([6]));
    for (let i = 0; i < n; i++) {
      const opened = Buffer.from(b.packets.read(arrived[i]));
      expect(opened.subarray(LINK + 20 + 16).toString('hex')).toBe(tcp[i].subarray(LINK + 20).toString('hex'));
    }
    b.packets.free(arrived, n);
  });
});

let number = 0;

/** A frame with ESP header and IV field in front of its payload, as inline crypto wants it. */
function withEspHeader(frame: Buffer): Buffer {
  number++;
  const length = frame.readUInt16BE(LINK + 2);
  const out = Buffer.concat([frame.subarray(0, LINK + 20), Buffer.alloc(16), frame.subarray(LINK + 20, LINK + length)]);
  out.writeUInt32BE(0x6001, LINK + 20);
  out.writeUInt32BE(number, LINK + 24);
  out[LINK + 9] = 50;
  out.writeUInt16BE(length + 16, LINK + 2);
  return out;
}
