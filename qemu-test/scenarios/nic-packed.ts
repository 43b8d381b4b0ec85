/** Our driver's packed virtqueues on QEMU's device, which we did not write. */
import { Feature } from '../../src/index.ts';
import { nicScenario } from './nic-stock.ts';

export const scenario = nicScenario(', with packed virtqueues', { packed: true }, [Feature.RING_PACKED]);
