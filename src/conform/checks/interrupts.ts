/** Interrupts of a PCI function: ISR status and MSI-X (Virtio 1.4, 4.1.4.5.1, 4.1.5.1.2.1, 4.1.5.3.1, 4.1.5.4.1). */
import { ConfigHeader } from '../../vfio/config-space.ts';
import { CommonCfgField as F, IsrBit, NO_VECTOR } from '../../virtio/pci-layout.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, should, untried } from '../check.ts';
import { udpFrame } from '../frames.ts';

const ISR = '4.1.4.5.1';
const VECTORS = '4.1.5.1.2.1';
const INTERRUPT_STATUS = 1 << 3;
const MAX_VECTORS = 0x800;
const NO_CHANGE = 'a driver cannot make a network device change its configuration';

function needMsix(bench: Bench): number {
  const { msix } = bench.target.structures;
  need(msix !== null, 'the function has no MSI-X capability');
  bench.log(`MSI-X Table Size: ${msix.vectors} vectors`);
  return msix.vectors;
}

/** The vector fields: of configuration changes, and of queue 0. */
function vectorFields(bench: Bench): readonly number[] {
  bench.target.structures.common.write16(F.queueSelect, 0);
  return [F.configMsixVector, F.queueMsixVector];
}

function map(bench: Bench, field: number, vector: number): number {
  const { common } = bench.target.structures;
  common.write16(field, vector);
  const came = common.read16(field);
  bench.log(`${field === F.configMsixVector ? 'config' : 'queue'}_msix_vector: wrote ${vector}, read ${came}`);
  return came;
}

/** Has the device use a transmit buffer, so that it would interrupt. */
async function transmit(bench: Bench, driver: Awaited<ReturnType<Bench['up']>>): Promise<void> {
  const mac = bench.mac(bench.target);
  await driver.transmit(udpFrame({ destination: mac, source: mac }));
}

export const interruptChecks: readonly Check[] = [
  untried(
    'PCI-032',
    ISR,
    'MUST',
    'The Device Configuration Interrupt bit is set before a configuration change notification',
    NO_CHANGE,
  ),
  must(
    'PCI-033',
    ISR,
    'Without MSI-X, the Queue Interrupt bit is set before a virtqueue notification',
    ['isr-never'],
    async (bench) => {
      const driver = await bench.up();
      const { isr } = bench.target.structures;
      isr.read8(0);
      await transmit(bench, driver);
      await bench.eventually(
        () => (isr.read8(0) & IsrBit.QUEUE) !== 0,
        'the Queue Interrupt bit of ISR status is not set after a buffer was used',
      );
      bench.log('a buffer was used, and the Queue Interrupt bit is set');
    },
  ),
  must(
    'PCI-034',
    ISR,
    'Without MSI-X, the Interrupt Status bit of the PCI Status register is set with ISR status',
    ['interrupt-status-never'],
    async (bench) => {
      const driver = await bench.up();
      const status = () => bench.target.fn.config.read16(ConfigHeader.status) & INTERRUPT_STATUS;
      const { isr } = bench.target.structures;
      isr.read8(0);
      await bench.eventually(() => status() === 0, 'Interrupt Status is set while ISR status is 0');
      await transmit(bench, driver);
      await bench.eventually(() => status() !== 0, 'Interrupt Status is not set after a buffer was used');
      isr.read8(0);
      await bench.eventually(() => status() === 0, 'Interrupt Status stays set after ISR status was read');
      bench.log('Interrupt Status followed ISR status');
    },
  ),
  must('PCI-035', ISR, 'ISR status is 0 after the driver has read it', ['isr-sticks'], async (bench) => {
    const driver = await bench.up();
    await transmit(bench, driver);
    const { isr } = bench.target.structures;
    await bench.eventually(
      () => bench.target.fn.config.read16(ConfigHeader.status) !== 0 && isr.read8(0) !== 0,
      'ISR status is 0 after a buffer was used',
    );
    const again = isr.read8(0);
    bench.log(`read again, ISR status is ${again}`);
    expect(again === 0, `ISR status reads ${again} the second time`);
  }),
  should('PCI-036', VECTORS, 'A device with MSI-X has 2 to 0x800 vectors', ['msix-one'], (bench) => {
    const vectors = needMsix(bench);
    expect(vectors >= 2 && vectors <= MAX_VECTORS, `the device has ${vectors} vectors`);
  }),
  must(
    'PCI-037',
    VECTORS,
    'The number of vectors is in the Table Size of the MSI-X capability',
    ['msix-one'],
    (bench) => {
      const vectors = needMsix(bench);
      const usable = bench.target.fn.interruptVectors;
      bench.log(`${usable} vectors can be connected`);
      expect(vectors === usable, `Table Size says ${vectors} vectors, ${usable} can be connected`);
    },
  ),
  untried(
    'PCI-038',
    VECTORS,
    'SHOULD',
    'Table Size is restricted to a value that might benefit performance',
    'which value that is, is known to the device alone',
  ),
  must('PCI-039', VECTORS, 'Any event can be mapped to any vector', ['vector-zero-only'], (bench) => {
    const vectors = needMsix(bench);
    for (const field of vectorFields(bench)) {
      for (const vector of new Set([0, 1, vectors >>> 1, vectors - 1])) {
        const came = map(bench, field, vector);
        expect(came === vector, `mapping to vector ${vector} of ${vectors} reads back ${came}`);
      }
    }
  }),
  must('PCI-040', VECTORS, 'Any event can be unmapped', ['vector-kept'], (bench) => {
    needMsix(bench);
    for (const field of vectorFields(bench)) {
      map(bench, field, 0);
      const came = map(bench, field, NO_VECTOR);
      expect(came === NO_VECTOR, `after unmapping, the vector reads ${came}`);
    }
  }),
  must(
    'PCI-041',
    VECTORS,
    'The vector fields read as the vector mapped, or NO_VECTOR',
    ['vector-wrong', 'vector-sticks'],
    (bench) => {
      needMsix(bench);
      for (const field of vectorFields(bench)) {
        for (const vector of [1, NO_VECTOR, 0, NO_VECTOR]) {
          const came = map(bench, field, vector);
          expect(came === vector, `mapped to ${vector}, the vector reads ${came}`);
        }
      }
    },
  ),
  should('PCI-042', VECTORS, 'Mapping an event to a vector does not fail', ['vector-zero-only'], (bench) => {
    const vectors = needMsix(bench);
    for (const field of vectorFields(bench)) {
      for (let vector = 0; vector < Math.min(vectors, 64); vector++) {
        const came = map(bench, field, vector);
        expect(came !== NO_VECTOR, `mapping to vector ${vector} of ${vectors} failed`);
      }
    }
  }),
  must('PCI-043', VECTORS, 'A mapping that fails reads as NO_VECTOR', ['vector-any'], (bench) => {
    const vectors = needMsix(bench);
    need(vectors < MAX_VECTORS, 'every vector number that there is exists');
    for (const field of vectorFields(bench)) {
      const came = map(bench, field, vectors);
      expect(came === NO_VECTOR, `mapping to vector ${vectors}, which does not exist, reads ${came}`);
    }
  }),
  must(
    'PCI-044',
    '4.1.5.3.1',
    'With MSI-X, a queue without a vector does not interrupt',
    ['interrupts-anyway'],
    async (bench) => {
      needMsix(bench);
      const driver = await bench.up({ stopped: true });
      const eventfds = bench.target.enableVectors(bench.target.fn.interruptVectors);
      const { common } = bench.target.structures;
      common.write16(F.configMsixVector, NO_VECTOR);
      for (const index of [0, 1]) {
        common.write16(F.queueSelect, index);
        common.write16(F.queueMsixVector, NO_VECTOR);
      }
      driver.start();
      await transmit(bench, driver);
      let fired = 0;
      await bench.never(() => {
        for (const eventfd of eventfds) fired += eventfd.drain();
        return fired > 0;
      }, 'a used buffer of a queue without a vector made an interrupt');
      bench.log(`a buffer was used, and none of ${eventfds.length} vectors fired`);
    },
  ),
  untried(
    'PCI-045',
    '4.1.5.4.1',
    'MUST',
    'With MSI-X, configuration changes without a vector do not interrupt',
    NO_CHANGE,
  ),
  untried(
    'PCI-046',
    '2.10.2',
    'MUST',
    'Shared memory regions are not used to control the device, nor to stream data',
    'what a region is used for does not show',
  ),
];
